"""Real gloo ranks for tests: the same function in several processes, its results back in rank order."""

import gc
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = timedelta(seconds=60)  # a test that hangs should say so soon


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` in `world_size` ranks of one process group; `fn` and what it returns must pickle.

    One rank runs in this process. More are spawned, which costs seconds: let one call check many cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        if world_size == 1:
            _as_rank(0, 1, folder, fn, args)
        else:
            mp.spawn(_as_rank, (world_size, folder, fn, args), nprocs=world_size)
        return [torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)]


def _as_rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if world_size > 1:
        torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        torch.save(fn(*args), _result_path(folder, rank))
    finally:
        gc.collect()  # a reducer that outlives its group may abort the interpreter at exit
        dist.destroy_process_group()


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.pt"
