"""One driver a run folder, at any moment, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.errors import ConfigError
from simclr_ray.train.lock import LOCK_NAME, Holder, Pace, RunLock, hold

PACE = Pace(beat_s=0.1, stale_s=3.0, watch_s=0.4)


def written(folder: Path, **changes: Any) -> None:
    """A lock that somebody else left."""
    holder: dict[str, Any] = {
        "token": "other", "host": "elsewhere", "boot": "b", "pid": 1, "beat": 5, "beaten": time.time(),
    }  # fmt: skip
    (folder / LOCK_NAME).write_text(json.dumps(holder | changes))


def test_row_44_of_many_at_the_same_moment_exactly_one_wins(tmp_path: Path) -> None:
    start, won, refused, release = threading.Barrier(8), [], [], threading.Event()

    def one() -> None:
        start.wait()
        try:
            with hold(str(tmp_path), lambda _: None, PACE) as lock:
                won.append(lock)
                release.wait(10)
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(won) + len(refused) < 8:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 7
    assert refused[0].exit_code == 2
    assert f"process {os.getpid()} on" in str(refused[0])
    assert "last heartbeat" in str(refused[0])
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_held_lock_stays_held_beyond_the_stale_limit(tmp_path: Path) -> None:
    with hold(str(tmp_path), lambda _: None, PACE) as lock:
        time.sleep(0.5)
        beats = Holder(**json.loads((tmp_path / LOCK_NAME).read_text())).beat
        assert beats >= 2
        assert lock.lost is None
        with pytest.raises(ConfigError, match="another run holds this folder"), hold(str(tmp_path), print, PACE):
            pass


def test_row_45_a_stale_lock_is_taken_over_and_said(tmp_path: Path) -> None:
    written(tmp_path, beaten=time.time() - 100)
    said: list[str] = []
    with hold(str(tmp_path), said.append, PACE) as lock:
        assert lock.lost is None
    assert "looks stale" in said[0]
    assert said[1] == "took over the lock of process 1 on elsewhere, which no longer beats"


def test_row_45_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "import os, sys; from simclr_ray.train.lock import RunLock, Pace;"
        "RunLock(sys.argv[1], Pace()).acquire(print); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert (tmp_path / LOCK_NAME).exists()
    said: list[str] = []
    started = time.monotonic()
    with hold(str(tmp_path), said.append, Pace(watch_s=60)):
        assert time.monotonic() - started < 10
    assert len(said) == 1
    assert said[0].startswith("took over the lock of process")


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_row_49_a_holder_whose_clock_is_an_hour_off_keeps_its_lock_while_it_beats(tmp_path: Path, skew: float) -> None:
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            storage.write_bytes(
                str(tmp_path / LOCK_NAME),
                Holder("other", "elsewhere", "b", 1, number, time.time() + skew).encode(),
            )
            stop.wait(0.1)

    written(tmp_path, beaten=time.time() + skew)
    thread = threading.Thread(target=beat)
    thread.start()
    taken = threading.Event()

    def attempt() -> None:
        with hold(str(tmp_path), lambda _: None, PACE):
            taken.set()

    try:
        other = threading.Thread(target=attempt, daemon=True)
        other.start()
        assert not taken.wait(1.5)
    finally:
        stop.set()
        thread.join()
    assert taken.wait(10), "it stopped beating, so it is taken over in the end"
    other.join()


def test_a_holder_that_was_paused_finds_that_it_lost_the_lock(tmp_path: Path) -> None:
    lock = RunLock(str(tmp_path), PACE)
    lock.acquire(print)
    written(tmp_path)
    deadline = time.monotonic() + 5
    while lock.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.lost == "process 1 on elsewhere"
    lock.release()
    assert (tmp_path / LOCK_NAME).exists(), "the lock of another is not removed"


def test_a_broken_lock_file_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("{")
    with hold(str(tmp_path), lambda _: None, PACE):
        pass
    assert not (tmp_path / LOCK_NAME).exists()
