"""One driver a run folder, at any moment, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.errors import ConfigError
from simclr_ray.train.lock import LOCK_NAME, Holder, Pace, RunLock, hold

PACE = Pace(beat_s=0.1, stale_s=3.0, watch_s=0.4, settle_s=0.3)


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder: of this machine, of a real S3 server, and of a store without compare-and-swap."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_folder"))
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def lock_of(folder: str) -> str:
    return storage.join(folder, LOCK_NAME)


def written(folder: str, **changes: Any) -> None:
    """A lock that somebody else left."""
    holder: dict[str, Any] = {
        "token": "other", "host": "elsewhere", "boot": "b", "pid": 1, "beat": 5, "beaten": time.time(),
    }  # fmt: skip
    storage.write_bytes(lock_of(folder), json.dumps(holder | changes).encode())


def race(folder: str) -> tuple[list[RunLock], list[ConfigError]]:
    """Eight drivers at the same moment: those that held the lock, and what the others were told."""
    won: list[RunLock] = []
    refused: list[ConfigError] = []
    start, release = threading.Barrier(8), threading.Event()

    def one() -> None:
        start.wait()
        try:
            with hold(folder, lambda _: None, PACE) as lock:
                won.append(lock)
                release.wait(20)
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
    return won, refused


def test_row_44_of_many_at_the_same_moment_exactly_one_wins(folder: str) -> None:
    won, refused = race(folder)
    assert len(won) == 1
    assert len(refused) == 7
    assert refused[0].exit_code == 2
    assert f"process {os.getpid()} on" in str(refused[0])
    assert "last heartbeat" in str(refused[0])
    assert not storage.exists(lock_of(folder))


def test_a_held_lock_stays_held_beyond_the_stale_limit(folder: str) -> None:
    with hold(folder, lambda _: None, PACE) as lock:
        time.sleep(0.5)
        beats = Holder(**json.loads(storage.read_bytes(lock_of(folder)))).beat
        assert beats >= 2
        assert lock.lost is None
        with pytest.raises(ConfigError, match="another run holds this folder"), hold(folder, print, PACE):
            pass


def test_row_45_a_stale_lock_is_taken_over_and_said(folder: str) -> None:
    written(folder, beaten=time.time() - 100)
    said: list[str] = []
    with hold(folder, said.append, PACE) as lock:
        assert lock.lost is None
    assert "looks stale" in said[0]
    assert said[1] == "took over the lock of process 1 on elsewhere, which no longer beats"


@pytest.mark.parametrize("folder", ["local", "s3"], indirect=True)
def test_row_45_a_dead_process_of_this_machine_is_not_waited_for(folder: str) -> None:
    program = (
        "import os, sys; from simclr_ray.train.lock import RunLock, Pace;"
        "RunLock(sys.argv[1], Pace()).acquire(print); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=False)
    assert storage.exists(lock_of(folder))
    said: list[str] = []
    started = time.monotonic()
    with hold(folder, said.append, Pace(watch_s=60)):
        assert time.monotonic() - started < 10
    assert len(said) == 1
    assert said[0].startswith("took over the lock of process")


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_row_49_a_holder_whose_clock_is_an_hour_off_keeps_its_lock_while_it_beats(folder: str, skew: float) -> None:
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            storage.write_bytes(
                lock_of(folder),
                Holder("other", "elsewhere", "b", 1, number, time.time() + skew).encode(),
            )
            stop.wait(0.1)

    written(folder, beaten=time.time() + skew)
    thread = threading.Thread(target=beat)
    thread.start()
    taken = threading.Event()

    def attempt() -> None:
        with hold(folder, lambda _: None, PACE):
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


def test_a_holder_that_was_paused_finds_that_it_lost_the_lock(folder: str) -> None:
    lock = RunLock(folder, PACE)
    lock.acquire(print)
    written(folder)
    deadline = time.monotonic() + 5
    while lock.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.lost == "process 1 on elsewhere"
    lock.release()
    assert storage.exists(lock_of(folder)), "the lock of another is not removed"


def test_a_broken_lock_file_is_taken_over(folder: str) -> None:
    storage.write_bytes(lock_of(folder), b"{")
    with hold(folder, lambda _: None, PACE):
        pass
    assert not storage.exists(lock_of(folder))


# A store without compare-and-swap, where more is left to looking.


@pytest.fixture
def weak() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_of_many_that_take_a_stale_lock_of_such_a_store_one_is_left(weak: str) -> None:
    """All delete and make it anew, some what another one had made; who is written over sees it before it begins."""
    written(weak, beaten=time.time() - 100)
    won, refused = race(weak)
    assert (len(won), len(refused)) == (1, 7)
    assert won[0].lost is None


def test_a_lock_that_another_wrote_over_before_it_settled_is_not_held(weak: str) -> None:
    """As where the look and the write of putting a file that is absent are two steps."""
    slower = threading.Timer(0.15, lambda: written(weak))
    slower.start()
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), hold(weak, print, PACE):
        pass
    slower.join()
    assert json.loads(storage.read_bytes(lock_of(weak)))["token"] == "other"


def test_a_holder_whose_lock_is_deleted_makes_it_again_if_nobody_else_does(weak: str) -> None:
    with hold(weak, print, PACE) as lock:
        storage.delete_file(lock_of(weak))
        deadline = time.monotonic() + 5
        while not storage.exists(lock_of(weak)) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert json.loads(storage.read_bytes(lock_of(weak)))["pid"] == os.getpid()
        assert lock.lost is None
