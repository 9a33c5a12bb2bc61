"""Kills a save at every operation on the file system, one after the other, and looks at what is left.

Run as a program, for it forks: each child saves and prunes, and ends without any clean-up just before its n-th
operation below the folder. The interpreter tells of each operation (audit events), so none is left out by hand.
Prints one JSON line a kill point, and ends with the first child that came through.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from simclr_ray.train import checkpoint as ckpt

KILLED, DONE = 77, 0
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}


def state(step: int) -> ckpt.Checkpoint:
    return ckpt.Checkpoint(step, {"w": torch.full((3, 2), float(step))}, {"0.m": torch.arange(4.0)}, {"at": step})


def die_before(operation: int, folder: str) -> None:
    """End this process just before the n-th operation on something in the folder."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and arguments and str(arguments[0]).startswith(folder):
            if seen == operation:
                os._exit(KILLED)
            seen += 1

    sys.addaudithook(hook)


def save_and_prune(folder: str, *, kill_at: int, keep: int) -> int:
    """What the child does; its exit status."""
    child = os.fork()
    if child == 0:
        die_before(kill_at, folder)
        ckpt.save(folder, state(3))
        ckpt.prune(folder, keep=keep)
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(scratch: str, keep: int) -> None:
    """Enumerate."""
    torch.set_num_threads(1)
    for kill_at in range(10_000):
        folder = f"{scratch}/{kill_at}"
        for step in (1, 2):
            ckpt.save(folder, state(step))
        # An interrupted save of the very step, as after a crash loop.
        half = Path(folder, ckpt.folder_name(3))
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
        status = save_and_prune(folder, kill_at=kill_at, keep=keep)
        warnings: list[str] = []
        newest = ckpt.load_newest(folder, warnings.append)
        left = ckpt.committed_steps(folder)
        # The next life saves the next step, and whatever lay about goes.
        ckpt.save(folder, state(4))
        ckpt.prune(folder, keep=keep)
        found = {
            "kill_at": kill_at,
            "status": status,
            "newest": newest and newest.step,
            "intact": newest is not None and bool((newest.model["w"] == newest.step).all()),
            "warnings": warnings,
            "committed": left,
            "folders_later": sorted(path.name for path in Path(folder).iterdir()),
        }
        print(json.dumps(found), flush=True)  # noqa: T201  what its caller reads
        shutil.rmtree(folder)
        if status != KILLED:
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
