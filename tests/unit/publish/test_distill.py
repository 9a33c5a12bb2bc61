"""What a student is refused before anything is trained, and which labels it sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.publish.distill import distill
from simclr_ray.train.teacher import labels_of_few
from tests.conftest import all_rows, small_run
from tests.unit.publish.made import made_run


@pytest.mark.parametrize(
    ("change", "what"), [({"views__flavour": "paper"}, "mean|flavour"), ({"views__size": 24}, "size")]
)
def test_a_student_that_sees_images_otherwise_than_its_teacher_is_refused(
    data_set: Manifest, tmp_path: Path, change: dict[str, object], what: str
) -> None:
    teacher = made_run(tmp_path / "teacher", data_set)
    student = small_run(tmp_path / "student", data_set, train__steps=2, **change)
    with pytest.raises(ConfigError, match=f"they differ in ({what})"):
        distill(teacher.uri, load_config(student.model_dump(mode="json")))
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_of_each_class_the_same_part_of_labels_is_seen_and_each_is_its_images_own(
    data_set: Manifest, fraction: float
) -> None:
    true = np.array([row["label"] for row in all_rows(data_set)])
    seen = labels_of_few(data_set, fraction, seed=1)
    assert (seen[seen >= 0] == true[seen >= 0]).all()
    for label in range(10):
        assert (seen == label).sum() == max(1, round(fraction * (true == label).sum()))
    assert (labels_of_few(data_set, fraction, seed=1) == seen).all()
    if fraction < 1:
        assert (labels_of_few(data_set, fraction, seed=2) != seen).any()
