"""`simclr-ray check`: what a run would meet, found in seconds and said in plain sentences, before anything is paid for.

It reads some real units from the real store, decodes and augments them, takes a step of the encoder and of the loss,
and multiplies. A running cluster that is given is asked for its resources, versions, guard and disks, and the measuring
is done on its nodes (`check_cluster`). No Ray is started, no training happens, and the run folder is written to only
with a probe that is deleted again.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, use_storage
from simclr_ray.data.manifest import Manifest, read_manifest, unit_rows_for
from simclr_ray.errors import ConfigError
from simclr_ray.train import check_cluster
from simclr_ray.train.cluster import usable_cores
from simclr_ray.train.cost import Rates, expected
from simclr_ray.train.derive import Derived, bytes_ahead, check_world_size, derive, policy_of, sentences
from simclr_ray.train.lock import LOCK_NAME
from simclr_ray.train.measure import measure_step, measure_stream
from simclr_ray.train.run import PROBE, identity, look_at_run, refuse_another

DEADLINE_S = 10.0
"""Longest time for one operation of a store; whoever checks does not want to wait out an outage."""
_MIB, _GIB = 1 << 20, 1 << 30


def check(config: ConfigSource = None, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Yield findings, a sentence each, as they are found.

    Args:
        config: As for `pretrain`.
        overrides: On top.

    Raises:
        ConfigError: a setting cannot work, or the run folder cannot be used.
        DataError: the data set is missing, broken, or more of it is unusable than the limit allows.
        StorageError: a store refuses or does not answer.
        ClusterError: a cluster that is given does not answer, or cannot give what is asked.
    """
    settings = load_config(config, overrides)
    use_storage(settings)
    patient = storage.current()
    storage.configure(replace(patient, deadline_s=min(DEADLINE_S, patient.deadline_s)))
    try:
        yield from _findings(settings)
    finally:
        storage.configure(patient)


def _findings(settings: Config) -> Iterator[str]:
    if not settings.data.train:
        raise ConfigError("data.train must be set", fix="add --set data.train=FOLDER")
    folder = storage.normalise(settings.data.train)
    yield f"store of the images: {storage.describe(folder)}"
    started = time.monotonic()
    manifest = read_manifest(folder)
    yield from _about(manifest, time.monotonic() - started)
    derived = derive(settings, manifest)
    if settings.cluster.workers:
        check_world_size(settings.cluster.workers, derived)
    yield from sentences(settings, derived)
    if settings.run.folder:
        yield from _run_folder(settings, manifest, settings.run.folder)
    else:
        yield "run.folder is not set; pretrain will need it"
    if check_cluster.is_given(settings.cluster):
        found: Iterator[str | Rates] = check_cluster.cluster_findings(settings, manifest, derived)
    else:
        found = _here(settings, manifest)
    rates = None
    for one in found:
        if isinstance(one, Rates):
            rates = one
        else:
            yield one
    yield from _memory(settings, derived)
    if rates is not None:
        yield from expected(settings, derived, rates)


def _here(config: Config, manifest: Manifest) -> Iterator[str | Rates]:
    """Measured on this machine, as the whole run would have it to itself."""
    stream = measure_stream(config, manifest)
    yield from stream.said
    step = measure_step(config, stream.views)
    yield from step.said
    workers = config.cluster.workers or 1
    cpus = max(config.cluster.data_cpus, usable_cores() - round(workers * config.cluster.cpus_per_worker))
    yield Rates(stream.rates, step.rates, workers, cpus)


def _about(manifest: Manifest, seconds: float) -> Iterator[str]:
    kinds = Counter(manifest.table.text("kind", shard) for shard in range(len(manifest.shards)))
    words = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    size = int(manifest.table.bytes.sum()) / _GIB
    yield (
        f"data set: {manifest.rows:,} images in {len(manifest.shards):,} shards ({words}) of {size:,.2f} GiB, "
        f"fingerprint {manifest.fingerprint[:12]}, manifest read in {seconds:.1f} s"
    )
    if manifest.unit_rows > 2 * unit_rows_for(manifest.rows):  # twice: some of a source may have been left out
        yield (
            f"warning: {manifest.rows // manifest.unit_rows:,} units of {manifest.unit_rows} images are few: images of "
            "a unit always meet in a step, and with 22 units a small data set lost a point of kNN accuracy; pack it, "
            f"and it will have units of about {unit_rows_for(manifest.rows)}"
        )


def _run_folder(config: Config, manifest: Manifest, folder: str) -> Iterator[str]:
    """Whether the folder can be written, and what is in it."""
    run = look_at_run(folder)
    yield f"store of the run: {storage.describe(run.uri)}"
    probe = run.path(f"{PROBE}{uuid4().hex[:12]}")
    storage.create_bytes(probe, b"")
    storage.delete_file(probe)
    info = run.info()
    if info is None:
        yield f"run folder: {run.uri} is new, and can be written"
        return
    refuse_another(run, info["identity"], identity(config, manifest.fingerprint))
    held = " and is held by a driver at the moment" if storage.exists(run.path(LOCK_NAME)) else ""
    yield f"run folder: {run.uri} holds this run ({info.get('status')}){held}; pretrain would continue it"


def _memory(config: Config, derived: Derived) -> Iterator[str]:
    """What the stream may hold, and where it would spill."""
    ahead = bytes_ahead(config, derived)
    shared = Path("/dev/shm")  # noqa: S108  where Ray's object store lives; nothing is written
    has = f"; /dev/shm has {shutil.disk_usage(shared).total / _GIB:.1f} GiB" if shared.is_dir() else ""
    size = policy_of(config.views).size
    share = -(-config.train.global_batch // (config.cluster.workers or 1))
    yield (
        f"memory: finished views that wait for the workers take up to {ahead / _MIB:,.0f} MiB of object store{has}; "
        f"one worker's share of a batch is {share * 6 * size * size / _MIB:,.0f} MiB of views"
    )


def run_check(config: ConfigSource, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Say each finding of `check`, and that nothing stands against the run."""
    started = time.monotonic()
    for line in check(config, overrides):
        say(line)
    say(f"checked in {time.monotonic() - started:.1f} s; nothing stands against pretrain")
