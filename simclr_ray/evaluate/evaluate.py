"""What a run learned: probes of the trained encoder beside two baselines, and pictures to look at.

The test set is the one the config names; it is used once, at the end, for the newest checkpoint. Nothing is ever
chosen by looking at it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from simclr_ray import storage
from simclr_ray.config import Config, EvaluateConfig
from simclr_ray.configure import load_config, use_storage
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.encode import (
    LabelledSet,
    TrainedEncoder,
    embed,
    load_encoder,
    random_encoder,
    read_labelled,
)
from simclr_ray.evaluate.intervals import interval95
from simclr_ray.evaluate.knn import knn_top1, nearest
from simclr_ray.evaluate.linear import L2_GRID, PAPER_L2_GRID, probe_over_seeds
from simclr_ray.evaluate.online import online_records, online_results
from simclr_ray.evaluate.protocols import SupervisedRow, finite, measure_supervised, supervised_text
from simclr_ray.evaluate.table import EvaluationRow, to_markdown, to_text
from simclr_ray.evaluate.workers import Represent, encoders_of
from simclr_ray.observe.console import Console
from simclr_ray.observe.health import alignment, contrastive_accuracy, rankme, uniformity
from simclr_ray.observe.metrics import Record, parse_jsonl
from simclr_ray.train.derive import limits_of
from simclr_ray.train.run import RunFolder, open_existing
from simclr_ray.version import __version__
from simclr_ray.views.policy import Policy

NUM_SHOWN, NUM_NEIGHBOURS = 12, 8
NUM_PAIRS = 1024
"""Test images whose two views give alignment and contrastive accuracy."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    rows: tuple[EvaluationRow, ...]
    """Raw pixels, random encoder, trained encoder."""
    folder: str
    """Where table, numbers and pictures are."""
    step: int
    """Checkpoint that was evaluated."""
    supervised: tuple[SupervisedRow, ...] = ()
    """Of the protocols that train with labels."""


def evaluate(run: str, overrides: Sequence[str] = (), *, pictures: bool = True) -> Evaluation:
    """Measure what a run learned and write `eval/` in its folder.

    Args:
        run: The run folder.
        overrides: Such as `["evaluate.knn_k=200"]`; only the sections evaluate and storage may change.
        pictures: Also draw the curve, the views and the nearest neighbours (needs matplotlib).

    Raises:
        ConfigError: no run here, or no test set is named.
        DataError: a data set is missing or has no labels.
        StorageError: the run has no valid checkpoint.
    """
    wrong = [text for text in overrides if not text.strip().startswith(("evaluate.", "storage."))]
    if wrong:
        raise ConfigError("only evaluate.* and storage.* can be set here; the rest is the run's", got=", ".join(wrong))
    use_storage(load_config(None, overrides))  # which may be needed to reach the run that holds the other settings
    folder, stored = open_existing(run)
    config = load_config(stored, overrides)
    use_storage(config)
    console = Console()
    trained = load_encoder(run)
    train_manifest, test_manifest = _manifests(config)
    train, test = _data(config, trained.policy, train_manifest, test_manifest)
    class_names = test_manifest.classes
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    console.say(
        f"evaluate: step {trained.step}; {len(train.labels):,} labelled training images, {len(test.labels):,} test "
        f"images, {num_classes} classes; probes use {config.evaluate.num_labels or 'all'} labels"
    )
    out = folder.path("eval", config.evaluate.name) if config.evaluate.name else folder.path("eval")
    about = _about(folder, config, trained, train_manifest, test_manifest)
    about["images"] = {
        name: {"used": len(one.labels), "rejected": one.rejected} for name, one in (("train", train), ("test", test))
    }
    rows: list[EvaluationRow] = []
    if "probes" in config.evaluate.protocols:
        costs = {}
        with encoders_of(config, random_encoder(config, train.views, trained.policy), trained) as representations:
            for name, encode in representations:
                console.say(f"  measuring: {name}")
                begun = time.perf_counter()
                rows.append(_measure(name, encode, train, test, config.evaluate, num_classes))
                costs[name] = round(time.perf_counter() - begun, 3)
        _write(out, rows, about, costs)
        console.block("\n" + to_text(rows) + "\n")
        if len(config.evaluate.seeds) > 1:
            console.say(f"linear: mean and 95 % interval over {len(config.evaluate.seeds)} probe seeds")
    supervised = measure_supervised(
        config, trained, train_manifest, test, out, num_classes=num_classes, about=about, say=console.say
    )
    if supervised:
        console.block("\n" + supervised_text(supervised) + "\n")
    if pictures and rows:
        measured = online_records(online_results(folder), config.train.global_batch)
        for path in _draw(folder, out, trained, train, test, rows, class_names, measured):
            console.say(f"picture: {path}")
    return Evaluation(tuple(rows), out, trained.step, tuple(supervised))


def _manifests(config: Config) -> tuple[Manifest, Manifest]:
    """Of the training and the test set."""
    train_uri = config.evaluate.train or config.data.train
    if config.evaluate.test is None or train_uri is None:
        raise ConfigError("no test set is named", where="evaluate.test", fix="add --set evaluate.test=FOLDER")
    train, test = read_manifest(train_uri), read_manifest(config.evaluate.test)
    refuse_other_classes(train, test)
    return train, test


def refuse_other_classes(train: Manifest, test: Manifest) -> None:
    """Refuse two sets whose labels do not mean the same; sets of numbers may have more of them than the other.

    Raises:
        DataError: a label's number names one class in one set and another in the other.
    """
    for number, (a, b) in enumerate(zip(train.classes, test.classes, strict=False)):
        if a != b:
            raise DataError(
                "the two labelled sets number their classes differently", where=f"{train.folder} and {test.folder}",
                got=f"label {number} is {a!r} in the first and {b!r} in the second",
                fix="pack both from folders (or lists) that have the same classes, also where one has no image of some",
            )  # fmt: skip


def _data(
    config: Config, policy: Policy, train_manifest: Manifest, test_manifest: Manifest
) -> tuple[LabelledSet, LabelledSet]:
    """Training set, and test set with view pairs, which only it needs."""
    limits = limits_of(config.data)
    train = read_labelled(train_manifest, policy, limits, num_pairs=0, seed=config.run.seed)
    test = read_labelled(test_manifest, policy, limits, num_pairs=NUM_PAIRS, seed=config.run.seed)
    if len(test.labels) < 2:
        raise DataError("the measures need pairs of test images", where=test_manifest.folder, got=f"{len(test.labels)}")
    return train, test


def _about(
    folder: RunFolder, config: Config, trained: TrainedEncoder, train: Manifest, test: Manifest
) -> dict[str, Any]:
    """What every result says of how it came about."""
    identity = dict((folder.info() or {}).get("identity", {}))
    return {
        "step": trained.step,
        "test": config.evaluate.test,
        "knn_k": config.evaluate.knn_k,
        "seeds": list(config.evaluate.seeds),
        "config": config.evaluate.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "run_seed": config.run.seed,
        "config_fingerprint": storage.digest(json.dumps(identity, sort_keys=True).encode()),
        "manifests": {"pretraining": identity.get("manifest"), "train": train.fingerprint, "test": test.fingerprint},
        "version": __version__,
    }


def _measure(
    name: str, encode: Represent, train: LabelledSet, test: LabelledSet, config: EvaluateConfig, num_classes: int
) -> EvaluationRow:
    train_h, test_h = encode(train.views), encode(test.views)
    pair_a, pair_b = encode(test.pairs[:, 0]), encode(test.pairs[:, 1])
    labels = min(config.num_labels or len(train_h), len(train_h))
    everything = labels == len(train_h)
    return EvaluationRow(
        name,
        knn_top1=knn_top1(
            train_h, train.labels, test_h, test.labels, k=config.knn_k, temperature=config.knn_temperature
        ),
        linear={
            f"{labels:,} labels": probe_over_seeds(
                train_h,
                train.labels,
                test_h,
                test.labels,
                num_classes=num_classes,
                seeds=config.seeds,
                num_labels=None if everything else labels,
                l2_grid=PAPER_L2_GRID if config.l2_grid == "paper" else L2_GRID,
            )
        },
        rankme=rankme(test_h),
        alignment=alignment(pair_a, pair_b),
        uniformity=uniformity(test_h),
        contrastive_accuracy=contrastive_accuracy(pair_a, pair_b),
    )


def _write(folder: str, rows: Sequence[EvaluationRow], about: Mapping[str, Any], costs: Mapping[str, float]) -> None:
    """`cost_s` are the seconds of each row, on one process or `evaluate.workers` actors; the last of the file."""
    numbers = {**about, "rows": [_numbers(row) for row in rows], "cost_s": dict(costs)}
    text = json.dumps(numbers, indent=1, allow_nan=False)
    storage.write_bytes(storage.join(folder, "results.json"), text.encode())
    storage.write_bytes(storage.join(folder, "table.md"), to_markdown(rows).encode())


def _numbers(row: EvaluationRow) -> dict[str, Any]:
    """A row with the interval that the probe's seeds leave its mean in; it says nothing of pretraining's own seeds."""
    numbers = asdict(row)
    for labels, summary in row.linear.items():
        numbers["linear"][labels]["interval95"] = interval95(summary.values)._asdict()
    return dict(finite(numbers))


def _draw(
    folder: RunFolder, out: str, trained: TrainedEncoder, train: LabelledSet, test: LabelledSet,
    rows: Sequence[EvaluationRow], names: tuple[str, ...], measured: Sequence[Record],
) -> list[str]:  # fmt: skip
    """Draw the pictures beside and put them into `eval/`, which may be on an object store."""
    from simclr_ray.evaluate.pictures import comparison_bars, curves, neighbour_sheet, views_sheet

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        try:
            records = parse_jsonl(storage.read_bytes(folder.metrics), where=folder.metrics)
            curves(records, place / "curve.png", measured=measured)
        except FileNotFoundError:
            if trained.step:  # imported weights, of step 0, were trained elsewhere
                raise DataError(
                    "the metrics of the training are gone, so its curve cannot be drawn", where=folder.metrics,
                    fix="restore the file, or add --no-pictures",
                ) from None  # fmt: skip
        views_sheet(list(test.views[:NUM_SHOWN]), test.pairs[:NUM_SHOWN], place / "views.png")
        comparison_bars(rows, place / "probes.png")
        similarity, found = _neighbours(trained, train, test)
        neighbour_sheet(
            list(test.views[:NUM_SHOWN]),
            [list(train.views[row]) for row in found],
            place / "neighbours.png",
            query_labels=test.labels[:NUM_SHOWN].tolist(),
            neighbour_labels=train.labels[found].tolist(),
            class_names=names or None,
            similarity=similarity.tolist(),
        )
        written = []
        for picture in sorted(place.glob("*.png")):
            written.append(storage.join(out, picture.name))
            storage.write_bytes(written[-1], picture.read_bytes())
    return written


def _neighbours(trained: TrainedEncoder, train: LabelledSet, test: LabelledSet) -> tuple[Tensor, Tensor]:
    """Cosine similarities and rows of the nearest training images of the first test images."""
    pool = embed(trained.model.embed, train.views, trained.policy)
    queries = embed(trained.model.embed, test.views[:NUM_SHOWN], trained.policy)
    return nearest(pool, queries, NUM_NEIGHBOURS)
