"""Verbs around a real training: numbers beside it, a teacher's student, and encoders on several actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from simclr_ray import distill, load_encoder, pretrain
from simclr_ray.configure import to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate.evaluate import evaluate
from simclr_ray.observe.metrics import read_jsonl
from tests.conftest import make_data_set, real_rows, small_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("test"), real_rows(100, "test"))


@pytest.fixture(scope="module")
def run(local_ray: None, data_set: Manifest, test_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with numbers taken beside it."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    config = small_run(
        folder, data_set, train__steps=20, train__checkpoint_every=5, train__keep_checkpoints=9, evaluate__every=5,
        evaluate__test=test_set.folder, evaluate__online_images=200,
    )  # fmt: skip
    return pretrain(config).folder


@pytest.fixture(scope="module")
def teacher(run: str) -> str:
    """The same with a classifier."""
    evaluate(
        run,
        ["evaluate.protocols=[finetune]", "evaluate.fractions=[1.0]", "evaluate.supervised_epochs=3",
         "evaluate.supervised_batch=64", "evaluate.seeds=[0]"],
        pictures=False,
    )  # fmt: skip
    return run


def test_checkpoints_are_measured_beside_the_training_and_the_last_one_surely(run: str) -> None:
    lines = [json.loads(line) for line in (Path(run) / "eval" / "online.jsonl").read_text().splitlines()]
    steps = [one["step"] for one in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert all(step % 5 == 0 for step in steps)
    for one in lines:
        assert one["images"] == 200
        assert one["rankme"] >= 1
        assert 0 <= one["knn_top1"] <= 1
        assert 0 <= one["linear_top1"] <= 1
        assert one["cpu_s"] > 0
        assert one["cpu_s_a_step"] > 0
    assert [record.step for record in read_jsonl(Path(run) / "metrics.jsonl")] == list(range(1, 21))


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(teacher: str, data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(
        tmp_path / "student", data_set, train__steps=12, optim__name="adamw", optim__base_learning_rate=0.01,
        optim__warmup_epochs=0, cluster__workers=2,
    )  # fmt: skip
    (tmp_path / "student.yaml").write_text(to_yaml(config.model_dump(mode="json")))
    result = distill(teacher, tmp_path / "student.yaml", labels="teacher")
    losses = [one.values["train/loss"] for one in read_jsonl(tmp_path / "student" / "metrics.jsonl")]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    stored = yaml.safe_load((tmp_path / "student" / "resolved.yaml").read_text())
    assert stored["distill"]["classifier"] == "eval/classifier-finetune-100pc.safetensors"
    assert len(stored["distill"]["digest"]) == 32
    assert stored["views"]["jitter_probability"] == 0
    student = load_encoder(result.folder)
    assert isinstance(student.model.projector, torch.nn.Linear)
    assert student.model.projector.out_features == 10


@pytest.mark.slow
def test_a_teacher_without_a_classifier_is_refused(teacher: str, data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(tmp_path / "student", data_set, train__steps=2)
    with pytest.raises(ConfigError, match="no such classifier") as caught:
        distill(teacher, config, classifier="eval/classifier-other.safetensors")
    assert "eval/classifier-finetune-100pc.safetensors" in str(caught.value)


@pytest.mark.slow
def test_several_actors_give_the_numbers_of_one_process(teacher: str) -> None:
    """Each image is encoded exactly once: accuracies over 100 test images would show one that is counted twice."""
    quick = ["evaluate.num_labels=100", "evaluate.seeds=[0]"]
    alone = evaluate(teacher, quick, pictures=False)
    three = evaluate(teacher, [*quick, "evaluate.workers=3"], pictures=False)
    for one, other in zip(alone.rows, three.rows, strict=True):
        assert other.knn_top1 == pytest.approx(one.knn_top1, abs=0.011)
        assert other.rankme == pytest.approx(one.rankme, rel=1e-3)
        assert other.uniformity == pytest.approx(one.uniformity, rel=1e-3)
