"""Saving beside the training: what is passed over, what is told, what ends the run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.saver import Intervals, Saver, SavesFailedError, Verdict

LAST = 100


def saver(folder: Path, *, steps: int = 10, seconds: float | None = None, said: list[str] | None = None) -> Saver:
    say = (said if said is not None else []).append
    return Saver(str(folder), Intervals(steps, seconds, LAST), keep=2, max_failures=3, say=say)


def state(step: int, tensor: torch.Tensor | None = None) -> ckpt.Checkpoint:
    return ckpt.Checkpoint(step, {"w": torch.full((4,), float(step)) if tensor is None else tensor}, {}, {})


def nothing() -> None:
    pass


def test_due_by_steps_by_time_at_the_end_and_when_asked(tmp_path: Path) -> None:
    by_steps = saver(tmp_path)
    assert [step for step in range(1, 25) if by_steps.verdict(step)] == [10, 20]
    assert by_steps.verdict(LAST) == Verdict.SAVE
    by_steps.ask()
    assert by_steps.verdict(3) == Verdict.SAVE
    assert saver(tmp_path, seconds=0.0).verdict(3) == Verdict.SAVE
    assert saver(tmp_path, seconds=1e6).verdict(3) == Verdict.GO_ON
    by_steps.stop()
    assert by_steps.verdict(4) == Verdict.SAVE | Verdict.STOP


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path) -> None:
    """Weights that the next step changes in place do not change the checkpoint under way."""
    weights, go = torch.ones(4), threading.Event()
    one = saver(tmp_path)
    one.save(state(10, weights), first=go.wait)
    weights.zero_()
    go.set()
    one.wait()
    assert torch.equal(ckpt.load(str(tmp_path), 10).model["w"], torch.ones(4))
    assert one.take_seconds() is not None
    assert one.take_seconds() is None


def test_an_interval_is_passed_over_while_the_one_before_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    one, go = saver(tmp_path, said=said), threading.Event()
    one.save(state(10), first=go.wait)
    one.save(state(20), first=nothing)
    assert said == ["checkpoint of step 20 passed over: the one before is still being written"]
    go.set()
    one.wait()
    one.save(state(30), first=nothing)
    one.wait()
    assert ckpt.committed_steps(str(tmp_path)) == [10, 30]


def test_one_that_was_asked_for_waits_instead(tmp_path: Path) -> None:
    one, go = saver(tmp_path), threading.Event()
    one.save(state(10), first=go.wait)
    one.ask()
    threading.Timer(0.1, go.set).start()
    one.save(state(11), first=nothing)
    one.wait()
    assert ckpt.committed_steps(str(tmp_path)) == [10, 11]
    assert one.verdict(12) == Verdict.GO_ON


def test_row_25_a_store_that_is_down_is_waited_out_and_then_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 25 and 28: training goes on and is told how old the newest checkpoint is."""
    said: list[str] = []
    one, write = saver(tmp_path, said=said), storage.write_bytes

    def down(uri: str, data: bytes) -> None:
        raise StorageError("cannot be written: no answer", where=uri)

    one.save(state(10), first=nothing)
    one.wait()
    monkeypatch.setattr(storage, "write_bytes", down)
    for step in (20, 30):
        one.save(state(step), first=nothing)
        one.wait()
    monkeypatch.setattr(storage, "write_bytes", write)
    one.save(state(40), first=nothing)
    one.wait()
    assert [line[:30] for line in said] == ["checkpoint not saved: cannot b"] * 2
    assert "the newest one is" in said[0]
    one.save(state(50), first=nothing)  # a success in between starts the count again
    one.wait()
    monkeypatch.setattr(storage, "write_bytes", down)
    for step in (60, 70, 80):
        one.save(state(step), first=nothing)
        one.wait()
    with pytest.raises(SavesFailedError, match=r"3 checkpoints in a row.*no answer") as caught:
        one.save(state(90), first=nothing)
    assert caught.value.exit_code == 4
    assert ckpt.committed_steps(str(tmp_path)) == [40, 50]


def test_the_last_step_is_written_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    one, write, left = saver(tmp_path, said=said), storage.write_bytes, [2]

    def twice_down(uri: str, data: bytes) -> None:
        if left[0]:
            left[0] -= 1
            raise StorageError("cannot be written: no answer", where=uri)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", twice_down)
    one.save(state(LAST), first=nothing)
    assert ckpt.committed_steps(str(tmp_path)) == [LAST]
    assert len(said) == 2


def test_row_28_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real full file system: a small tmpfs, where mounting one is allowed."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        said: list[str] = []
        one = saver(disk, said=said)
        one.save(state(10), first=nothing)
        one.wait()
        one.save(state(20, torch.zeros(200_000)), first=nothing)
        one.wait()
        one.save(state(30), first=nothing)
        one.wait()
        assert "No space left on device" in said[0]
        assert ckpt.committed_steps(str(disk)) == [10, 30]
        assert sorted(path.name for path in disk.iterdir()) == [ckpt.folder_name(10), ckpt.folder_name(30)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
