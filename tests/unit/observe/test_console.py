import io
import sys

import pytest

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.observe.console import Console, duration, print_error, printable
from simclr_ray.observe.metrics import Record

VALUES = {
    "train/loss": 3.2139,
    "train/contrastive_accuracy": 0.412,
    "data/images_per_s": 850.2,
    "data/wait_fraction": 0.013,
    "train/learning_rate": 1.9e-3,
    "data/rejected_total": 0.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **values: float) -> Record:
    return Record(step, samples_seen=256 * step, attempt=1, wall_s=0.0, values=values or VALUES)


def run(steps, *, seconds_a_step: float, total_steps: int | None = 400, interval_s: float = 30.0) -> list[str]:
    """Print a run whose clock moves by the step; return the lines."""
    stream, clock = io.StringIO(), Clock()
    with Console(total_steps=total_steps, stream=stream, interval_s=interval_s, clock=clock) as console:
        for step in steps:
            clock.now = 100.0 + seconds_a_step * step
            console.progress(record(step))
    return stream.getvalue().splitlines()


def test_a_line_says_everything_in_a_fixed_order():
    assert run([1, 120], seconds_a_step=0.465)[1:] == [
        "step 120/400  loss 3.214  acc 41.2 %  850 img/s  wait 1.3 %  lr 1.9e-03  eta 2 min 10 s"
    ]


def test_lines_are_rare_but_the_first_and_the_last_always_come():
    lines = run(range(1, 101), seconds_a_step=1, total_steps=100)
    assert [line.split()[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert "eta" not in lines[0]
    assert "eta" not in lines[-1]


def test_a_run_that_stops_early_says_where():
    assert run(range(1, 11), seconds_a_step=1)[-1].startswith("step 10/400")


def test_an_unknown_length_shows_no_eta():
    lines = run([1, 50], seconds_a_step=1, total_steps=None)
    assert lines[-1].startswith("step 50  loss")
    assert "eta" not in lines[-1]


def test_results_of_an_evaluation_come_at_once():
    stream = io.StringIO()
    console = Console(total_steps=9, stream=stream, clock=Clock())
    console.progress(record(1))
    console.progress(record(2))
    console.progress(record(2, **{"eval/knn_top1": 0.721}))
    assert stream.getvalue().splitlines()[1:] == ["step 2/9  knn 72.1 %  eta 0 s"]


@pytest.mark.parametrize("name", ["rejected", "animated"])
def test_rejected_and_animated_images_are_shown_once_there_are_any(name):
    for live in (False, True):
        for count, shown in ((0.0, live and name == "rejected"), (1234.0, True)):
            stream = io.StringIO()
            with Console(stream=stream, live=live) as console:
                console.progress(record(1, **{"train/loss": 2.0, f"data/{name}_total": count}))
            assert (name in stream.getvalue()) == shown
            assert ("1,234" in stream.getvalue()) == (count > 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (130, "2 min 10 s"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


HOSTILE = "cat\n\x1b[2Jerror: all lost\r\u202e\udc80\u2028\x9b"


def test_nothing_hostile_reaches_the_terminal():
    text = printable(HOSTILE)
    assert text == r"cat\n\x1b[2Jerror: all lost\r\u202e\udc80\u2028\x9b"
    assert printable("caf\u00e9 50 %") == "caf\u00e9 50 %"
    stream = io.StringIO()
    console = Console(stream=stream)
    console.say(HOSTILE)
    console.table(["name", "n"], [[HOSTILE, 1]])
    assert len(stream.getvalue().splitlines()) == 3
    assert "\x1b" not in stream.getvalue()


def test_tables_are_aligned():
    stream = io.StringIO()
    Console(stream=stream).table(["reason", "count"], [["truncated", 12], ["too small", 3456]])
    assert stream.getvalue() == "reason     count\ntruncated     12\ntoo small   3456\n"


def test_an_error_is_its_sentence_on_stderr(capsys):
    print_error(ConfigError("must be even", where="train.batch", got=3, expected="2 or 4", fix="use 2"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: train.batch: must be even (got 3); expected 2 or 4\n  use 2\n"


def test_a_strangers_name_cannot_forge_an_error_of_its_own():
    stream = io.StringIO()
    print_error(DataError(f"no images in {HOSTILE}", where=HOSTILE, got=HOSTILE, fix="look\nat it"), stream)
    assert "\x1b" not in stream.getvalue()
    assert all(line.startswith("  ") for line in stream.getvalue().split("\n")[1:-1])


def test_a_stream_that_cannot_say_it_says_an_escape():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream=stream).say("caf\u00e9")
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_closed_pipe_does_not_stop_the_run():
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Console(total_steps=2, stream=ClosedPipe()) as console:
        console.progress(record(1))
        console.say("still here")


def test_a_terminal_gets_one_live_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    stream, stdout = io.StringIO(), sys.stdout
    with Console(total_steps=400, run_folder="runs/a\x1b[31m", stream=stream, clock=Clock(), live=True) as console:
        console.progress(record(120))
        console.say("saved [bold]checkpoint[/bold] 100")
        console.progress(record(120, **{"eval/knn_top1": 0.5}))
    text = stream.getvalue()
    assert "saved [bold]checkpoint[/bold] 100" in text
    assert r"run runs/a\x1b[31m" in text
    final = text[text.rindex("run runs/a") :]
    for shown in ("step 120/400", "3.214", "41.2 %", "850", "1.3 %", "1.9e-03", "kNN top-1", "50.0 %", "rejected"):
        assert shown in final
    assert sys.stdout is stdout, "the live screen must give stdout back"


def test_a_terminal_with_nothing_to_show_stays_empty_of_numbers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    with Console(total_steps=5, stream=stream, live=True):
        pass
    assert "step 0/5" in stream.getvalue()
    assert "loss" not in stream.getvalue()
