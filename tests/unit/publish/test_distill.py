"""What a student is refused before anything is trained, and which labels it sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ray import storage
from simclr_ray.config import DistillConfig
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.publish.distill import distill
from simclr_ray.train.run import compare, identity
from simclr_ray.train.teacher import SeenLabels, Teacher, labels_of_teacher, read_classifier
from tests.conftest import small_run
from tests.unit.publish.made import made_run, results


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


class Constant(torch.nn.Module):
    """Stands for an encoder: what is learned of labels needs none."""


def teacher_of(seen: SeenLabels | None) -> Teacher:
    return Teacher(Constant(), torch.nn.Linear(1, 10), seen=seen)


def test_a_student_sees_the_labels_that_its_teacher_saw_and_no_other(data_set: Manifest) -> None:
    ids, labels = np.array([5, 0, 99]), np.array([3, 9, 0])
    found = labels_of_teacher(teacher_of(SeenLabels(ids, labels, data_set.fingerprint)), data_set)
    assert len(found) == data_set.rows
    assert found[ids].tolist() == labels.tolist()
    assert (np.delete(found, ids) == -1).all()


@pytest.mark.parametrize("seen", [None, SeenLabels(np.array([0]), np.array([0]), "of another")])
def test_labels_of_another_data_set_are_refused(data_set: Manifest, seen: SeenLabels | None) -> None:
    with pytest.raises(ConfigError, match="not of the student's data set"):
        labels_of_teacher(teacher_of(seen), data_set)


def test_a_classifier_that_was_replaced_is_refused(data_set: Manifest, tmp_path: Path) -> None:
    run = made_run(tmp_path / "teacher", data_set)
    name = "eval/classifier-finetune-10pc.safetensors"
    storage.write_bytes(run.path(name), b"one")
    settings = DistillConfig(teacher=run.uri, classifier=name, digest=storage.digest(b"one"))
    assert read_classifier(settings)[1] == b"one"
    storage.write_bytes(run.path(name), b"other")
    with pytest.raises(ConfigError, match="another one than when this student began"):
        read_classifier(settings)


def test_a_student_that_began_with_another_classifier_is_refused_and_told_so(
    data_set: Manifest, tmp_path: Path
) -> None:
    """Evaluating the teacher again writes over the file: the message must say what happened."""
    teacher = made_run(tmp_path / "teacher", data_set)
    name = "eval/classifier-finetune-10pc.safetensors"
    storage.write_bytes(teacher.uri + "/" + name, b"other")
    made_run(
        tmp_path / "student", data_set, distill__teacher=teacher.uri, distill__classifier=name,
        distill__digest=storage.digest(b"one"),
    )  # fmt: skip
    student = small_run(tmp_path / "student", data_set, train__steps=6, optim__warmup_epochs=0)
    with pytest.raises(ConfigError, match="another one than when this student began"):
        distill(teacher.uri, student)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_teacher_is_never_its_own_student(data_set: Manifest, tmp_path: Path, fresh: bool) -> None:
    """With `fresh` it would be deleted first."""
    teacher = made_run(tmp_path / "teacher", data_set, evaluation=results(0.8))
    before = sorted(path.name for path in (tmp_path / "teacher").rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "teacher")
    for name in ("teacher", "link", "x/../teacher"):
        with pytest.raises(ConfigError, match="the student's folder is its teacher's"):
            distill(teacher.uri, small_run(tmp_path / name, data_set, train__steps=2), fresh=fresh)
    assert sorted(path.name for path in (tmp_path / "teacher").rglob("*")) == before


def test_colours_that_a_student_would_not_see_are_refused(data_set: Manifest, tmp_path: Path) -> None:
    teacher = made_run(tmp_path / "teacher", data_set)
    student = small_run(tmp_path / "student", data_set, train__steps=2)
    with pytest.raises(ConfigError, match="crops and flips alone"):
        distill(teacher.uri, student, ["views.jitter_probability=0.8"])
    with pytest.raises(ConfigError, match="no classifier yet"):
        distill(teacher.uri, student, ["views.jitter_probability=0.00"])  # which is what it sees


def test_where_the_teacher_lies_is_free_once_its_file_is_known(data_set: Manifest, tmp_path: Path) -> None:
    here, there = (
        identity(small_run(tmp_path / "s", data_set, distill__teacher=place, distill__digest="d"), "m")
        for place in ("/a", "s3://bucket/a")
    )
    assert compare(here, there) == []
    unknown = identity(small_run(tmp_path / "s", data_set, distill__teacher="/a"), "m")
    assert len(compare(unknown, here)) == 2
