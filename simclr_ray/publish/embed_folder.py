"""The folder of an embedding: taken for one work, looked at when it goes on, finished by `manifest.json`; no Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from simclr_ray import storage
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ClusterError, ConfigError, DataError
from simclr_ray.evaluate.encode import TrainedEncoder
from simclr_ray.publish.embed_part import EmbedOrder, Precision
from simclr_ray.publish.parts import Dtype, FoundPart, Part, RejectedImage, look_at_part, part_of
from simclr_ray.version import __version__

FORMAT = 1
MANIFEST_NAME, BEGUN_NAME, REJECTED_NAME = "manifest.json", "_begun.json", "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [("sample_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
_FOOTERS_AT_ONCE = 16


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


def identity_of(
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


def claim_folder(folder: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
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


def found_parts(
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


def finish_folder(
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
