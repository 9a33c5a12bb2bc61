"""Checkpoints that exist or do not: tensors as safetensors, the rest as JSON, `COMMIT.json` written last.

The marker names every file with its size and digest, so a folder without it, or with files that do not match it, is
no checkpoint. The newest valid one wins. No pickle anywhere, so loading runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from simclr_ray import storage
from simclr_ray.errors import StorageError

FORMAT = 1
COMMIT_NAME = "COMMIT.json"
_FOLDER = re.compile(r"^step-(\d{9})$")

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
    """Write a checkpoint below `folder` (the run's `checkpoints/`) and commit it. One process calls this."""
    target = storage.join(folder, folder_name(checkpoint.step))
    storage.delete_folder(target)  # what an interrupted save of the same step left behind
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
    files = {
        "model.safetensors": save_tensors(_contiguous(checkpoint.model)),
        "optimizer.safetensors": save_tensors(_contiguous(checkpoint.optimizer)),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(target, name), data)
    vouched = {name: {"bytes": len(data), "digest": storage.digest(data)} for name, data in files.items()}
    marker = json.dumps({"format": FORMAT, "files": vouched}, indent=1).encode()
    storage.write_bytes(storage.join(target, COMMIT_NAME), marker)


def load(folder: str, step: int) -> Checkpoint:
    """Load one committed checkpoint.

    Raises:
        InvalidCheckpoint: it is not whole.
    """
    target = storage.join(folder, folder_name(step))
    files = _verified(target)
    try:
        state = json.loads(files["state.json"])
        model, optimizer = load_tensors(files["model.safetensors"]), load_tensors(files["optimizer.safetensors"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{target}: {error}") from None
    if state.pop("format") > FORMAT:
        raise InvalidCheckpoint(f"{target}: written by a newer version")
    return Checkpoint(state.pop("step"), model, optimizer, state)


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
    steps = [int(match[1]) for name in storage.list_names(folder) if (match := _FOLDER.match(name))]
    return [step for step in steps if storage.exists(storage.join(folder, folder_name(step), COMMIT_NAME))]


def expired(committed: Sequence[int], *, keep: int) -> list[int]:
    """Steps whose checkpoints may be deleted: all but the newest `keep`, of which there is at least one."""
    assert keep >= 1
    return sorted(committed)[:-keep]


def prune(folder: str, *, keep: int) -> None:
    """Delete expired checkpoints; the marker goes first, so a half-deleted one is none."""
    for step in expired(committed_steps(folder), keep=keep):
        target = storage.join(folder, folder_name(step))
        storage.delete_file(storage.join(target, COMMIT_NAME))
        storage.delete_folder(target)


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


def _contiguous(tensors: Mapping[str, Tensor]) -> Tensors:
    """On the CPU, and in the default layout: safetensors stores no strides, and channels-last weights have others."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _verified(target: str) -> dict[str, bytes]:
    """All files of a checkpoint, each compared with what the marker vouches for."""
    try:
        vouched = json.loads(storage.read_bytes(storage.join(target, COMMIT_NAME)))["files"]
        files = {name: storage.read_bytes(storage.join(target, name)) for name in vouched}
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"{target}: file missing: {error.filename or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{target}: {COMMIT_NAME} is broken: {error!r}") from None
    for name, data in files.items():
        if len(data) != vouched[name]["bytes"] or storage.digest(data) != vouched[name]["digest"]:
            raise InvalidCheckpoint(f"{target}: {name} is not what was committed")
    return files
