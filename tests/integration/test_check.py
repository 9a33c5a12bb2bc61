"""`simclr-ray check` as a user calls it: sentences and exit codes, over local folders and a real S3 server."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.cli import main
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.train.cost import Rates, StepRates, StreamRates, expected
from simclr_ray.train.derive import derive
from tests.conftest import make_data_set, real_rows
from tests.faults.commands import recipe
from tests.servers import seaweed


def test_a_good_run_is_described_and_nothing_is_left_behind(
    data_set: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe(tmp_path / "run", data_set))]) == 0
    said = capsys.readouterr().out
    assert "data set: 400 images in 4 shards (4 parquet)" in said
    assert "warning: 25 units of 16 images are few" in said
    assert re.search(r"reading: 128 images in 8 units took \d+ requests", said)
    assert "decoding: 64 images decoded, 128 headers read, 0 refused" in said
    assert "images: 128 PNG; 28 x 28 to 28 x 28" in said
    assert "expected reads: 1,920 images" in said  # 30 steps of 64
    assert re.search(r"loss: of a step of 64 images \d\.\d+ s on one such device", said)
    assert "nothing stands against pretrain" in said
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_s3_is_described_without_a_secret(
    s3: seaweed.Seaweed, s3_folder: str, data_set: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted(Path(data_set.folder).iterdir()):
        storage.write_bytes(f"{s3_folder}/data/{file.name}", file.read_bytes())
    file = recipe(tmp_path / "run", data_set)
    places = ["--set", f"data.train={s3_folder}/data", "--set", f"run.folder={s3_folder}/run"]
    assert main(["check", str(file), *places]) == 0
    said = capsys.readouterr().out
    assert f"bucket train at {s3.endpoint}" in said
    assert "credentials: the environment" in said
    assert seaweed.SECRET_KEY not in said
    assert storage.list_names(f"{s3_folder}/run") == []


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"train__global_batch": 100}, 2, "must be a multiple"),
        ({"data__train": "/nowhere/at/all"}, 3, "no data set here"),
        ({"storage__endpoint": "http://127.0.0.1:9", "data__train": "s3://train/x"}, 4, "127.0.0.1:9"),
    ],
)
def test_row_21_what_stands_against_a_run_is_a_sentence_and_an_exit_code(
    data_set: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: int,
    words: str,
) -> None:
    """Also where the store does not answer, within seconds."""
    started = time.monotonic()
    sets = [part for key, value in changes.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    assert main(["check", str(recipe(tmp_path / "run", data_set)), *sets]) == code
    assert time.monotonic() - started < 25
    assert words in capsys.readouterr().err


def test_more_bad_images_than_the_limit_are_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ImageRow(b"<html>", None, "x") if i % 5 == 0 else row for i, row in enumerate(real_rows(400))]
    file = recipe(tmp_path / "run", make_data_set(tmp_path / "data", rows))
    assert main(["check", str(file)]) == 3
    assert "cannot be used, and pretrain would stop" in capsys.readouterr().err
    assert main(["check", str(file), "--set", "data.max_rejected_fraction=0.3"]) == 0


@pytest.mark.parametrize("every", [1, 3])
def test_images_that_break_when_decoded_are_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    """Their headers are good; all of them, or a third."""
    rows = [
        ImageRow(row.image[: len(row.image) * 2 // 3], row.label, row.uri) if i % every == 0 else row
        for i, row in enumerate(real_rows(400))
    ]
    data_set = make_data_set(tmp_path / "data", rows)
    assert main(["check", str(recipe(tmp_path / "run", data_set))]) == 3
    assert re.search(r"\d+ of 64 images cannot be used", capsys.readouterr().err)


def test_what_a_run_would_take_is_arithmetic(data_set: Manifest) -> None:
    config = load_config({"train": {"global_batch": 64, "steps": 1000}, "optim": {"warmup_epochs": 1}})
    stream, step = StreamRates(1000.0, 0.5, 1e6, 0.009), StepRates(0.018, 0.001)

    def said(stream: StreamRates, step: StepRates, workers: int = 1) -> list[str]:
        return list(expected(config, derive(config, data_set), Rates(stream, step, workers, 1)))

    lines = said(stream, step)
    assert "64,000 images, 32,000 requests, 0.1 GiB" in lines[0]
    assert "9.6 minutes of a core" in lines[1]
    assert "19.2 minutes of such a device for the encoder, 1.1 minutes for the loss" in lines[1]
    assert "20.3 minutes with 1 such device and 1 CPU for the stream; the encoder decides" in lines[2]
    assert "decoding and views decides, add 4.7 times the CPUs" in said(replace(stream, views_s=0.09), step)[2]
    assert "reading from the store decides, add 5.3 times" in said(replace(stream, read_bytes_s=1e4), step)[2]
    assert "the loss decides, which grows with the square" in said(stream, replace(step, loss_s=0.03))[2]
    assert "20.3 minutes with" not in said(stream, step, workers=2)[2]
    assert "what workers send each other is not in it" in said(stream, step, workers=2)[2]
