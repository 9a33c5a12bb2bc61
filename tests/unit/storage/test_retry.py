"""The law of retries: bounded pauses with full jitter, a deadline that holds, one judgement an error."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.storage.retry import BASE_S, BYTES_PER_DEADLINE, CAP_S, Deadline, Fault, GaveUp, ceiling, pause, repeat


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def passing(_: Exception) -> Fault:
    return Fault("test", passing=True)


@given(st.integers(1, 10_000), st.floats(0, 1000))
def test_a_pause_is_within_its_ceiling_and_the_deadline(failures: int, left: float) -> None:
    assert 0 <= pause(failures, left) <= min(ceiling(failures), left)
    assert pause(failures, left, lambda low, high: high) == min(BASE_S * 2 ** min(failures - 1, 60), CAP_S, left)


@given(st.integers(1, 100))
def test_ceilings_double_up_to_the_cap(failures: int) -> None:
    assert ceiling(failures + 1) == min(2 * ceiling(failures), CAP_S)


def test_jitter_is_full() -> None:
    drawn = [pause(8, 1e9) for _ in range(4000)]
    assert statistics.mean(drawn) == pytest.approx(CAP_S / 2, rel=0.05)
    assert min(drawn) < 0.05 * CAP_S
    assert max(drawn) > 0.95 * CAP_S


@given(st.floats(0.1, 500), st.floats(0, 20))
def test_no_attempt_begins_after_the_deadline(seconds: float, spent_by_attempt: float) -> None:
    clock = Clock()
    begun: list[float] = []

    def attempt(_: int) -> None:
        begun.append(clock.now)
        clock.now += spent_by_attempt
        raise OSError("no")

    with pytest.raises(GaveUp) as caught:
        repeat(attempt, passing, Deadline(seconds, clock), what="x", sleep=clock.sleep)
    assert begun[-1] <= seconds + 1e-9
    assert clock.now <= seconds + spent_by_attempt + 1e-9
    assert caught.value.attempts == len(begun) == len(clock.pauses) + 1


@given(st.integers(0, 8))
def test_it_ends_with_the_first_success_and_counts_the_failures_before(failures: int) -> None:
    clock, before = Clock(), storage.counters().retries.get("test", 0)

    def attempt(number: int) -> int:
        if number < failures:
            raise OSError("no")
        return number

    assert repeat(attempt, passing, Deadline(1e9, clock), what="x", sleep=clock.sleep) == failures
    assert storage.counters().retries.get("test", 0) == before + failures
    assert all(0 <= slept <= ceiling(number) for number, slept in enumerate(clock.pauses, 1))


def test_what_does_not_pass_is_not_repeated() -> None:
    clock = Clock()

    def attempt(_: int) -> None:
        raise OSError("no")

    with pytest.raises(GaveUp) as caught:
        repeat(attempt, lambda _: Fault("x", passing=False), Deadline(10, clock), what="x", sleep=clock.sleep)
    assert (caught.value.attempts, clock.pauses) == (1, [])
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("answer", [FileNotFoundError("x"), StorageError("x")])
def test_answers_go_through(answer: Exception) -> None:
    def attempt(_: int) -> None:
        raise answer

    with pytest.raises(type(answer)) as caught:
        repeat(attempt, passing, Deadline(10), what="x")
    assert caught.value is answer


@given(st.integers(0, 1 << 40))
def test_a_large_body_gets_its_time(size: int) -> None:
    clock = Clock()
    deadline = Deadline(120.0, clock)
    deadline.allow_for(size)
    assert deadline.left == pytest.approx(120.0 * max(1.0, size / BYTES_PER_DEADLINE))
    clock.now = 1e12
    assert deadline.left == 0.0
    deadline.restart()
    assert deadline.left == pytest.approx(120.0 * max(1.0, size / BYTES_PER_DEADLINE))


def test_a_long_trial_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()

    def attempt(_: int) -> None:
        raise OSError("no")

    with pytest.raises(GaveUp):
        repeat(attempt, passing, Deadline(60, clock), what="s3://b/k", sleep=clock.sleep)
    assert [record.message.split(";")[0] for record in caplog.records] == ["s3://b/k: test"]
