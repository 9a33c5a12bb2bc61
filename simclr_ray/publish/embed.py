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

import io
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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
from simclr_ray.publish.embed_part import ROWS_AT_ONCE, EmbedOrder, PartMaker, Precision
from simclr_ray.publish.parts import Dtype, FoundPart, Part, RejectedImage, cut, look_at_part, part_of
from simclr_ray.train.cluster import connected, prints_logged, refuse_other_versions
from simclr_ray.train.derive import limits_of
from simclr_ray.train.run import open_existing
from simclr_ray.version import __version__

FORMAT = 1
MANIFEST_NAME, BEGUN_NAME, REJECTED_NAME = "manifest.json", "_begun.json", "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [("sample_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
ROWS_PER_FILE = 4096
"""16 MB of float16 vectors of ResNet-50."""
SAY_EVERY_S = 30.0
_FOOTERS_AT_ONCE = 16
_MOST_BLOCKS = 4096
"""Pieces of work that Ray Data is told of at most; with more parts, one piece has several."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class EmbedOptions:
    """How a data set is embedded."""

    dtype: Dtype = "float16"
    """Of the stored vectors."""
    precision: Precision = "fp32"
    """Of the encoder while it computes."""
    step: int | None = None
    """Checkpoint of the run; None takes the newest."""
    rows_per_file: int | None = None
    """Images of a file: whole units, and a multiple of `ROWS_AT_ONCE`; None: about 4096."""
    actors: tuple[int, int] | None = None
    """Fewest and most actors; None: one, up to what the cluster has room for now."""
    use_gpu: bool | None = None
    """A GPU for each actor; None: where the cluster has one."""
    cpus_per_actor: int = 1
    """Threads that decode beside a GPU, or those of an encoder on CPUs."""


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
        DataError: the data set is missing, or a shard of it is another one than its manifest's.
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
    identity = _identity(trained, manifest, limits, options, rows_per_file)
    order = _order(out, trained, manifest, limits, options, identity)
    finished = _claim(out, identity)
    parts = cut(manifest.rows, rows_per_file)
    if finished is not None:
        say(f"{out}: complete already, nothing to do")
        return _report_of(out, finished, kept=len(parts), seconds=0.0)
    found = _found(out, parts, order.work)
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
    written = _found(out, parts, order.work, known=found)
    numbers = _finish(order, identity, parts, written, run=run, step=trained.step)
    return _report_of(out, numbers, kept=len(found), seconds=seconds)


def read_embedding(folder: str) -> dict[str, Any]:
    """`manifest.json` of a finished embedding.

    Raises:
        DataError: there is none, or it was not finished.
    """
    folder = storage.normalise(folder)
    try:
        return dict(json.loads(storage.read_bytes(storage.join(folder, MANIFEST_NAME))))
    except FileNotFoundError:
        begun = storage.exists(storage.join(folder, BEGUN_NAME))
        raise DataError(
            "the embedding here is not finished" if begun else "no embedding here: manifest.json is missing",
            where=folder, fix="run the same simclr-ray embed again" if begun else "make one with: simclr-ray embed",
        ) from None  # fmt: skip


def weights_digest(model: torch.nn.Module) -> str:
    """Digest of a module's names, parameters and buffers."""
    parts = [f"{name}:{storage.digest(value.numpy().tobytes())}" for name, value in sorted(model.state_dict().items())]
    return storage.digest("\n".join(parts).encode())


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


def _identity(
    trained: TrainedEncoder, manifest: Manifest, limits: Limits, options: EmbedOptions, rows_per_file: int
) -> dict[str, Any]:
    """Everything that decides the vectors and where they lie."""
    policy = trained.policy
    return {
        "format": FORMAT,
        "encoder": weights_digest(trained.model.encoder),
        "data_set": manifest.fingerprint,
        "images": manifest.rows,
        "size": policy.size,
        "central_fraction": policy.central_fraction,
        "interpolation": policy.interpolation,
        "flavour": policy.flavour,
        "mean": list(policy.mean) if policy.mean else None,
        "std": list(policy.std) if policy.std else None,
        "dtype": options.dtype,
        "precision": options.precision,
        "rows_per_file": rows_per_file,
        "limits": asdict(limits) | {"background": list(limits.background)},
    }


def _order(
    out: str, trained: TrainedEncoder, manifest: Manifest, limits: Limits, options: EmbedOptions,
    identity: Mapping[str, Any],
) -> EmbedOrder:  # fmt: skip
    work = storage.digest(json.dumps(identity, sort_keys=True).encode())
    return EmbedOrder(
        work, out, manifest, columns_of(manifest, "label"), limits, trained.policy, options.dtype, options.precision,
        trained.width,
    )  # fmt: skip


def _claim(folder: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Take the folder; returns `manifest.json` where the same work is finished.

    Raises:
        ConfigError: it holds something else.
    """
    wanted = json.dumps(identity, indent=1).encode()
    names = storage.list_names(folder)
    for name in (MANIFEST_NAME, BEGUN_NAME):
        if name in names:
            said = json.loads(storage.read_bytes(storage.join(folder, name)))
            begun = said["identity"] if name == MANIFEST_NAME else said
            _refuse_another(folder, begun, json.loads(wanted))
            return dict(said) if name == MANIFEST_NAME else None
    if names:
        raise ConfigError(
            "the folder is not empty and holds no embedding", where=folder, got=", ".join(names[:3]),
            fix="choose another folder, or delete this one",
        )  # fmt: skip
    storage.write_bytes(storage.join(folder, BEGUN_NAME), wanted)
    return None


def _refuse_another(folder: str, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = [key for key in dict.fromkeys([*begun, *wanted]) if begun.get(key) != wanted.get(key)]
    if keys:
        lines = "\n".join(f"  {key}: there {begun.get(key)!r}, now {wanted.get(key)!r}" for key in keys)
        raise ConfigError(
            f"the folder holds embeddings of another work:\n{lines}", where=folder,
            fix="choose another folder, or repeat the command with the same encoder, data set and options",
        )  # fmt: skip


def _found(
    folder: str, parts: list[Part], work: str, known: Mapping[Part, FoundPart] | None = None
) -> dict[Part, FoundPart]:
    """The parts that are there, whole and of this work.

    Raises:
        ConfigError: a file of vectors lies there that belongs to no part.
    """
    known = dict(known or {})
    wanted, there = set(parts), list[Part]()
    for name in storage.list_names(folder):
        part = part_of(name)
        if part is None:
            continue
        if part not in wanted:
            raise ConfigError("a file of vectors that is no part of this work", where=storage.join(folder, name),
                              fix="move it away")  # fmt: skip
        if part not in known:
            there.append(part)
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        looked = pool.map(lambda part: look_at_part(storage.join(folder, part.name)), there)
        for part, found in zip(there, looked, strict=True):
            if found and (found.note.work, found.note.first, found.note.stop) == (work, part.first, part.stop):
                known[part] = found
    return known


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


def _finish(
    order: EmbedOrder, identity: Mapping[str, Any], parts: list[Part], found: Mapping[Part, FoundPart], *, run: str,
    step: int,
) -> dict[str, Any]:  # fmt: skip
    """Write what stands beside the parts, `manifest.json` last.

    Raises:
        ClusterError: a part is missing, though Ray said that all were made.
    """
    absent = [part.name for part in parts if part not in found]
    if absent:
        raise ClusterError(
            f"{len(absent)} files are missing after all were made", where=order.folder, got=absent[0],
            fix="run the same command again",
        )  # fmt: skip
    rejected = [one for part in parts for one in found[part].note.rejected]
    _write_rejected(order.folder, rejected)
    reasons: dict[str, int] = {}
    for one in rejected:
        reasons[one.reason] = reasons.get(one.reason, 0) + 1
    numbers = {
        "identity": dict(identity),
        "version": __version__,
        "run": storage.normalise(run),
        "step": step,
        "data_set": {"folder": order.manifest.folder, "classes": list(order.manifest.classes)},
        "rows": sum(found[part].rows for part in parts),
        "width": order.width,
        "labelled": order.columns.label is not None,
        "rejected": reasons,
        "files": [
            {"name": part.name, "first": part.first, "stop": part.stop, "rows": found[part].rows,
             "bytes": found[part].bytes}
            for part in parts
        ],
    }  # fmt: skip
    storage.write_bytes(storage.join(order.folder, MANIFEST_NAME), json.dumps(numbers, indent=1).encode())
    storage.delete_file(storage.join(order.folder, BEGUN_NAME))
    return numbers


def _write_rejected(folder: str, rejected: list[RejectedImage]) -> None:
    table = pa.Table.from_pylist([one._asdict() for one in rejected], schema=REJECTED_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(storage.join(folder, REJECTED_NAME), buffer.getvalue())


def _report_of(folder: str, numbers: Mapping[str, Any], *, kept: int, seconds: float) -> EmbedReport:
    return EmbedReport(
        folder, int(numbers["rows"]), int(numbers["width"]), dict(numbers["rejected"]), len(numbers["files"]), kept,
        seconds,
    )  # fmt: skip
