"""Checkpoints that exist or do not: tensors as safetensors, the rest as JSON, `COMMIT.json` written last.

The marker names every file with its size and digest, so a folder without it, or with files that do not match it, is
no checkpoint. The newest valid one wins. No pickle anywhere, so loading runs no code.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from simclr_ray import storage
from simclr_ray.errors import DataError, StorageError
from simclr_ray.version import __version__

FORMAT = 1
COMMIT_NAME = "COMMIT.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_FOLDER = re.compile(r"^step-(\d{9})$")
_MALFORMED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading JSON of a stranger's may raise: the last for a number without end and for brackets without end."""
_LONGEST_MARKER = 1 << 16

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on from a step."""

    step: int
    """Optimizer steps done."""
    model: Tensors
    optimizer: Tensors
    facts: Mapping[str, Any]
    """Plain values: fingerprints, samples seen, attempts."""


class InvalidCheckpoint(Exception):
    """A folder that is not a committed checkpoint; the text says why."""


def folder_name(step: int) -> str:
    """Folder of a step's checkpoint inside `checkpoints/`."""
    return f"step-{step:09d}"


def save(folder: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint below `folder` (the run's `checkpoints/`) and commit it. One process calls this.

    Raises:
        StorageError: it could not be written; what was written is removed again as far as the store lets us.
    """
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
    target = storage.join(folder, folder_name(checkpoint.step))
    _publish(target, lambda name: _encoded(name, checkpoint, state))


def _publish(target: str, content: Callable[[str], bytes]) -> None:
    """Write each of `FILES`, then the marker; what cannot be finished is removed as far as the store lets us."""
    _discard(target)  # what an earlier save of the same step left behind, whole or not
    vouched = {}
    try:
        for name in FILES:  # one at a time: a large model's bytes are in memory once, beside its tensors
            data = content(name)
            storage.write_bytes(storage.join(target, name), data)
            vouched[name] = {"bytes": len(data), "digest": storage.digest(data)}
        marker = json.dumps({"format": FORMAT, "files": vouched}, indent=1).encode()
        storage.write_bytes(storage.join(target, COMMIT_NAME), marker)
    except StorageError:
        with contextlib.suppress(StorageError):
            _discard(target)
        raise


def copy(source: str, step: int, target: str, *, manifest: str) -> Checkpoint:
    """Copy a committed checkpoint into another run, byte for byte, every digest verified on the way.

    Args:
        source: The `checkpoints/` to take it from.
        step: Of the checkpoint.
        target: The `checkpoints/` to put it in.
        manifest: Fingerprint of the target's data set: a position means nothing in another one.

    Raises:
        StorageError: it is not whole, or cannot be read or written.
        DataError: it was made from another data set.
    """
    try:
        files = _verified(storage.join(source, folder_name(step)))
        found = _parsed(source, step, files)
    except InvalidCheckpoint as error:
        have = ", ".join(map(str, committed_steps(source))) or "none"
        raise StorageError(
            f"no valid checkpoint of step {step} to begin from: {error}", where=source, got=f"steps {have}"
        ) from None
    if found.facts.get("manifest") != manifest:
        raise DataError(
            "the checkpoint to begin from was made from another data set",
            where=source,
            got=str(found.facts.get("manifest")),
            expected=manifest,
        )
    _publish(storage.join(target, folder_name(step)), lambda name: files[name])
    return found


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """A copy on the CPU that later steps do not change, for saving beside them."""
    return replace(checkpoint, model=_copied(checkpoint.model), optimizer=_copied(checkpoint.optimizer))


def _encoded(name: str, checkpoint: Checkpoint, state: Mapping[str, Any]) -> bytes:
    match name:
        case "model.safetensors":
            return bytes(save_tensors(_contiguous(checkpoint.model)))
        case "optimizer.safetensors":
            return bytes(save_tensors(_contiguous(checkpoint.optimizer)))
    return json.dumps(state, indent=1).encode()


def _discard(target: str) -> None:
    """Delete a checkpoint; the marker goes first, so a half-deleted one is none."""
    storage.delete_file(storage.join(target, COMMIT_NAME))
    storage.delete_folder(target)


def load(folder: str, step: int) -> Checkpoint:
    """Load one committed checkpoint.

    Raises:
        InvalidCheckpoint: it is not whole.
        StorageError: it was written by a newer version, or cannot be read.
    """
    return _parsed(folder, step, _verified(storage.join(folder, folder_name(step))))


def _parsed(folder: str, step: int, files: Mapping[str, bytes]) -> Checkpoint:
    target = storage.join(folder, folder_name(step))
    try:
        state = json.loads(files["state.json"])
        model, optimizer = load_tensors(files["model.safetensors"]), load_tensors(files["optimizer.safetensors"])
        del state["format"]
        saved = int(state.pop("step"))
    except (*_MALFORMED, SafetensorError) as error:
        raise InvalidCheckpoint(f"{target}: {error!r}") from None
    if saved != step:
        raise InvalidCheckpoint(f"{target}: holds step {saved}")
    return Checkpoint(saved, model, optimizer, state)


def load_newest(folder: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """Load the newest valid checkpoint; None when there has never been one.

    Broken ones that are newer lose their marker, for they are none: retention must not count them as the newest.

    Args:
        folder: The run's `checkpoints/`.
        warn: Told about each broken checkpoint that was passed over.

    Raises:
        StorageError: there are committed checkpoints, but none is valid. A run never silently starts again.
    """
    broken = []
    for step in sorted(committed_steps(folder), reverse=True):
        try:
            found = load(folder, step)
        except InvalidCheckpoint as error:
            broken.append(str(error))
            warn(f"checkpoint passed over: {error}")
            continue
        for newer in committed_steps(folder):
            if newer > step:
                storage.delete_file(storage.join(folder, folder_name(newer), COMMIT_NAME))
        return found
    if broken:
        raise StorageError(
            "no checkpoint of this run is valid:\n  " + "\n  ".join(broken),
            where=folder,
            fix="restore one from a copy, or choose another run folder to start again",
        )
    return None


def committed_steps(folder: str) -> list[int]:
    """Steps whose checkpoint has a commit marker, ascending."""
    return [step for step in _steps(folder) if storage.exists(storage.join(folder, folder_name(step), COMMIT_NAME))]


def _steps(folder: str) -> list[int]:
    """Steps that have a folder, committed or not, ascending."""
    return sorted(int(match[1]) for name in storage.list_names(folder) if (match := _FOLDER.match(name)))


def expired(committed: Sequence[int], *, keep: int) -> list[int]:
    """Steps whose checkpoints may be deleted: all but the newest `keep`, of which there is at least one."""
    assert keep >= 1
    return sorted(committed)[:-keep]


def forget(folder: str, steps: Sequence[int]) -> None:
    """Delete the checkpoints of these steps."""
    for step in steps:
        _discard(storage.join(folder, folder_name(step)))


def prune(folder: str, *, keep: int) -> None:
    """Delete expired checkpoints, and what interrupted saves before the newest committed one left behind.

    Only what is committed counts as kept: a crash loop in the middle of saves could otherwise push out the last good
    one. Called with no save in progress.
    """
    committed = committed_steps(folder)
    gone = set(expired(committed, keep=keep))
    gone |= {step for step in _steps(folder) if committed and step < committed[-1] and step not in committed}
    forget(folder, sorted(gone))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as named tensors, `<index of the parameter>.<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put named tensors back into a freshly built optimizer; its groups and settings stay as built."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def model_tensors(model: nn.Module) -> Tensors:
    """Parameters and buffers by name, batch-norm statistics among them."""
    return dict(model.state_dict())


def _copied(tensors: Mapping[str, Tensor]) -> Tensors:
    """On the CPU, apart from the originals. Copies off a GPU are queued together and waited for once."""
    out = {name: value.detach().to("cpu", copy=True, non_blocking=value.is_cuda) for name, value in tensors.items()}
    if any(value.is_cuda for value in tensors.values()):
        torch.cuda.synchronize()
    return out


def _contiguous(tensors: Mapping[str, Tensor]) -> Tensors:
    """In the default layout, on the CPU: safetensors stores no strides, and channels-last weights have others."""
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}


def _verified(target: str) -> dict[str, bytes]:
    """All files of a checkpoint, each compared with what the marker vouches for."""
    sizes = {entry.uri.rpartition("/")[2]: entry.bytes for entry in storage.list_level(target)[1]}
    vouched = _vouched(target, sizes)
    files = {}
    for name in FILES:
        # Sizes first, so that nothing large is read in vain, and no more than was vouched for.
        if name not in sizes:
            raise InvalidCheckpoint(f"{target}: {name} is missing")
        if sizes[name] != vouched[name]["bytes"]:
            raise InvalidCheckpoint(
                f"{target}: {name} has {sizes[name]} bytes, {vouched[name]['bytes']} were committed"
            )
        try:
            files[name] = storage.read_bytes(storage.join(target, name))
            if storage.digest(files[name]) != vouched[name]["digest"]:  # perhaps on its way here: look once more
                files[name] = storage.read_bytes(storage.join(target, name))
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{target}: {name} is missing") from None
        if storage.digest(files[name]) != vouched[name]["digest"]:
            raise InvalidCheckpoint(f"{target}: {name} is not what was committed")
    return files


def _vouched(target: str, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What the marker says of each of `FILES`."""
    try:
        if sizes[COMMIT_NAME] > _LONGEST_MARKER:
            raise InvalidCheckpoint(f"{target}: {COMMIT_NAME} has {sizes[COMMIT_NAME]} bytes")
        marker = json.loads(storage.read_bytes(storage.join(target, COMMIT_NAME)))
        written_in = int(marker["format"])
        if written_in <= FORMAT:
            return {name: {key: marker["files"][name][key] for key in ("bytes", "digest")} for name in FILES}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{target}: {COMMIT_NAME} is missing") from None
    except _MALFORMED as error:
        raise InvalidCheckpoint(f"{target}: {COMMIT_NAME} is broken: {error!r}") from None
    # Not "invalid": falling back to an older one would quietly undo what the newer version did.
    raise StorageError(
        "the checkpoint was written by a newer version of simclr_ray",
        where=target,
        got=f"format {written_in}",
        expected=f"at most {FORMAT}, of version {__version__}",
        fix="use the version that wrote it, or choose another run folder",
    )
