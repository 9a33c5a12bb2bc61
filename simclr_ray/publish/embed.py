"""The verb `embed`: an encoder over a whole data set, by Ray Data on a pool of actors, into a folder of Parquet files.

```
_begun.json          what the folder is being made from; there while the work is not finished
embeddings-A-B.parquet   the images with sample ids [A, B), see `parts`
rejected.parquet     images that did not decode, and why
manifest.json        written last: a folder that has it is complete
```

An actor makes a whole part by itself: it reads ahead by ranges, decodes, encodes and writes. So pixels never pass
through Ray, whose pool grows and shrinks the actors and gives a lost one's parts to another. A killed work goes on with
the same command: a part that is there and whole stays, the others are made. Two drivers on one folder do the same
work twice and harm nothing, for both write the same files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.exceptions
import torch

from simclr_ray import storage
from simclr_ray.config import ClusterConfig
from simclr_ray.data.decode import Limits
from simclr_ray.data.inputs import columns_of
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.stream import configure_ray_data
from simclr_ray.errors import ClusterError, ConfigError, DataError, NumericsError, SimclrError, StorageError
from simclr_ray.evaluate.encode import TrainedEncoder, load_encoder
from simclr_ray.publish.embed_folder import EmbedOptions, claim_folder, finish_folder, found_parts, identity_of
from simclr_ray.publish.embed_part import ROWS_AT_ONCE, EmbedOrder, PartMaker
from simclr_ray.publish.parts import Part, cut, look_at_part
from simclr_ray.train.cluster import connected, prints_logged, refuse_other_versions
from simclr_ray.train.derive import limits_of
from simclr_ray.train.run import open_existing

ROWS_PER_FILE = 4096
"""16 MB of float16 vectors of ResNet-50."""
SAY_EVERY_S = 30.0
_MOST_BLOCKS = 4096
"""Pieces of work that Ray Data is told of at most; with more parts, one piece has several."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class EmbedReport:
    """What an embedding left behind."""

    folder: str
    rows: int
    """Embeddings."""
    width: int
    """Length of a vector."""
    rejected: Mapping[str, int]
    """Images without an embedding, by reason."""
    parts: int
    kept: int
    """Parts that an earlier start had made."""
    seconds: float
    """Of this start, without Ray's."""


def embed(
    run: str, data_set: str, out: str, options: EmbedOptions | None = None, *, address: str | None = None,
    say: Say = lambda line: None,
) -> EmbedReport:  # fmt: skip
    """Embed every image of a data set with the encoder of a run; the same call continues what was killed.

    Args:
        run: The run folder.
        data_set: Folder of a manifest, packed or indexed.
        out: Empty or absent folder, or one in which the same work was begun.
        options: How.
        address: Of a running Ray cluster; None uses RAY_ADDRESS or starts a local one.
        say: Told how it goes.

    Raises:
        ConfigError: no run here, or the folder holds something else or a work of another encoder or data set.
        DataError: the data set is missing, a shard of it is another one than its manifest's, or none of its images
            could be embedded.
        StorageError: the run has no valid checkpoint, or a store fails.
        ClusterError: Ray or its resources.
        NumericsError: an embedding is not finite.
    """
    options = options or EmbedOptions()
    out = storage.normalise(out)
    manifest = read_manifest(data_set)
    rows_per_file = _check(options, manifest)
    trained = load_encoder(run, options.step)
    limits = limits_of(open_existing(run)[1].data)
    identity = identity_of(trained, manifest, limits, options, rows_per_file)
    order = _order(out, trained, manifest, limits, options, identity)
    finished = claim_folder(out, identity)
    parts = cut(manifest.rows, rows_per_file)
    if finished is not None:
        report = _report_of(out, finished, kept=len(parts), seconds=0.0)
        say(f"{out}: complete already, nothing to do")
        return report
    found = found_parts(out, parts, order.work)
    missing = [part for part in parts if part not in found]
    say(f"embed: {manifest.rows:,} images into {len(parts):,} files of vectors of {order.width} {options.dtype}s")
    if found:
        say(f"{len(found):,} files are there already; {len(missing):,} to go")
    seconds = 0.0
    if missing:
        with connected(ClusterConfig(address=address)), prints_logged():
            refuse_other_versions()
            started = time.monotonic()
            _run(order, trained, missing, options, say)
            seconds = time.monotonic() - started
    written = found_parts(out, parts, order.work, known=found)
    numbers = finish_folder(order, identity, parts, written, run=run, step=trained.step)
    return _report_of(out, numbers, kept=len(found), seconds=seconds)


def _check(options: EmbedOptions, manifest: Manifest) -> int:
    """Images of a file.

    Raises:
        ConfigError: an option cannot work.
        DataError: there is nothing to embed.
    """
    whole = math.lcm(ROWS_AT_ONCE, manifest.unit_rows)
    rows = options.rows_per_file if options.rows_per_file is not None else whole * math.ceil(ROWS_PER_FILE / whole)
    if rows < 1 or rows % whole:
        raise ConfigError(
            "files hold whole units and whole batches", where="rows_per_file", got=rows,
            expected=f"a multiple of {whole}",
        )  # fmt: skip
    fewest, most = options.actors or (1, 1)
    if not 1 <= fewest <= most:
        raise ConfigError("no pool of actors", where="actors", got=f"{fewest}:{most}", expected="1 <= fewest <= most")
    if options.cpus_per_actor < 1:
        raise ConfigError("an actor needs a CPU", where="cpus_per_actor", got=options.cpus_per_actor)
    if not manifest.rows:
        raise DataError("the data set has no images", where=manifest.folder)
    return rows


def _order(
    out: str, trained: TrainedEncoder, manifest: Manifest, limits: Limits, options: EmbedOptions,
    identity: Mapping[str, Any],
) -> EmbedOrder:  # fmt: skip
    work = storage.digest(json.dumps(identity, sort_keys=True).encode())
    return EmbedOrder(
        work, out, manifest, columns_of(manifest, "label"), limits, trained.policy, options.dtype, options.precision,
        trained.width,
    )  # fmt: skip


def _run(order: EmbedOrder, trained: TrainedEncoder, missing: list[Part], options: EmbedOptions, say: Say) -> None:
    """Have the missing parts made.

    Raises:
        SimclrError: a part cannot be made; those that are written stay.
    """
    configure_ray_data()
    use_gpu, (fewest, most) = _pool(options, ray.cluster_resources(), len(missing))
    say(f"actors: {fewest} to {most} on {'GPU' if use_gpu else 'CPU'}, {options.cpus_per_actor} CPU each")
    orders = ray.data.from_items(
        [{"first": part.first, "stop": part.stop} for part in missing],
        override_num_blocks=min(len(missing), _MOST_BLOCKS),
    )
    done = orders.map_batches(
        EmbedActor,
        fn_constructor_args=(ray.put(order), ray.put(trained.model.encoder), options.cpus_per_actor),
        batch_size=1,
        batch_format="numpy",
        concurrency=(fewest, most),
        num_cpus=options.cpus_per_actor,
        **({"num_gpus": 1} if use_gpu else {}),
    )
    started = said = time.monotonic()
    images = rejected = 0
    total = sum(part.images for part in missing)
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise _error_of(row["error"])
            images += int(row["rows"]) + int(row["rejected"])
            rejected += int(row["rejected"])
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                say(f"{images:,} of {total:,} images, {images / (said - started):,.0f} a second, {rejected:,} rejected")
    except ray.exceptions.RayTaskError:
        raise  # a bug of ours
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ClusterError(
            f"embedding stopped: {lines[-1] if lines else type(error).__name__}", where="Ray Data",
            fix="run the same command again; what is written stays",
        ) from error  # fmt: skip


def _pool(options: EmbedOptions, has: Mapping[str, float], parts: int) -> tuple[bool, tuple[int, int]]:
    """Whether actors have GPUs, and the fewest and most of them.

    Raises:
        ClusterError: the cluster has room for none, and nobody said that it will.
    """
    use_gpu = options.use_gpu if options.use_gpu is not None else has.get("GPU", 0) >= 1
    room = int(has.get("CPU", 0) // options.cpus_per_actor)
    if use_gpu:
        room = min(room, int(has.get("GPU", 0)))
    if options.actors is not None:  # an autoscaler may add what is missing
        return use_gpu, (options.actors[0], max(options.actors[0], min(options.actors[1], parts)))
    if room < 1:
        raise ClusterError(
            "the cluster has no room for an actor", got=f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs",
            expected=f"{options.cpus_per_actor} CPUs{' and a GPU' if use_gpu else ''}",
            fix="use fewer CPUs an actor, or say --actors 1:N where an autoscaler adds nodes",
        )  # fmt: skip
    return use_gpu, (1, max(1, min(room, parts)))


class EmbedActor:
    """Makes parts; one process, one device."""

    def __init__(self, order: Any, encoder: Any, cpus: int) -> None:
        """Put the encoder on the device. Order and encoder are references to Ray's object store, one copy a node."""
        self._order: EmbedOrder = ray.get(order)
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        on_gpu = device.type == "cuda"
        torch.set_num_threads(1 if on_gpu else cpus)
        module = ray.get(encoder).eval().to(device).to(memory_format=torch.channels_last)
        self._maker = PartMaker(self._order, module, device, threads=cpus if on_gpu else 0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make one part, unless a lost actor had made it already. Errors of the user's come back as values."""
        part = Part(int(batch["first"][0]), int(batch["stop"][0]))
        rows, rejected, error = 0, 0, ""
        try:
            found = look_at_part(storage.join(self._order.folder, part.name))
            if found is not None and found.note.work == self._order.work:
                rows, rejected = found.rows, len(found.note.rejected)
            else:
                rows, rejected, _ = self._maker.make(part)
        except SimclrError as one:
            error = _told(one)
        return {"rows": [rows], "rejected": [rejected], "error": [error]}


def _told(error: SimclrError) -> str:
    """An error as text: Ray Data passes on the message of what a function raised, but not the error itself."""
    parts = {name: getattr(error, name) for name in ("what", "where", "expected", "fix")}
    return json.dumps({"class": type(error).__name__, "got": None if error.got is None else str(error.got), **parts})


def _error_of(text: str) -> SimclrError:
    parts = json.loads(text)
    kinds = {kind.__name__: kind for kind in (ConfigError, DataError, StorageError, ClusterError, NumericsError)}
    return kinds.get(parts.pop("class"), SimclrError)(parts.pop("what"), **parts)


def _report_of(folder: str, numbers: Mapping[str, Any], *, kept: int, seconds: float) -> EmbedReport:
    """What a finished folder says.

    Raises:
        DataError: it has no embedding at all.
    """
    if not numbers["rows"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dict(numbers["rejected"]).items())
        raise DataError("no image of the data set could be embedded", where=folder, got=reasons,
                        fix="see rejected.parquet there for each image's reason")  # fmt: skip
    return EmbedReport(
        folder, int(numbers["rows"]), int(numbers["width"]), dict(numbers["rejected"]), len(numbers["files"]), kept,
        seconds,
    )  # fmt: skip
