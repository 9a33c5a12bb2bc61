"""The calm console: the only place that prints. One live screen on a terminal, a rare plain line elsewhere.

Everything printed passes `printable`: names of files, classes and buckets come from strangers, and a newline or an
escape sequence in one must not forge a line or drive the reader's terminal. A stream that goes away (a closed pipe)
silences the console; it never stops training.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from simclr_ray.errors import SimclrError
from simclr_ray.observe.metrics import Record
from simclr_ray.storage.redaction import redact


def printable(text: object) -> str:
    r"""Return `str(text)` with every character that is not printable written as an escape (`\n`, `\x1b`, `\u202e`).

    That covers control characters, line separators, direction overrides and the surrogates of undecodable file names.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def duration(seconds: float) -> str:
    """Write a time span for people: `45 s`, `2 min 10 s`, `3 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_error(error: SimclrError, stream: TextIO | None = None) -> None:
    """Write a user's error to stderr as its sentence, without a traceback.

    The place and the value, which may be a stranger's text, stay on one line. What failed and what to do may have
    several lines of ours; each further one is indented, so none can pass for a message of its own.
    """
    calm = SimclrError(
        _indented(error.what),
        where=None if error.where is None else printable(error.where),
        got=None if error.got is None else printable(error.got),
        expected=None if error.expected is None else printable(error.expected),
        fix=None if error.fix is None else _indented(error.fix),
    )
    _write_line(stream or sys.stderr, redact(f"error: {calm}"))


class Console:
    """What a verb tells its user: sentences, tables and the progress of a run.

    Use it as a context manager around a run; `say` and `table` also work outside of it.
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        run_folder: str | None = None,
        stream: TextIO | None = None,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        """Choose the display.

        Args:
            total_steps: the last step of the run; None when there is no progress to show.
            run_folder: shown on the live screen.
            stream: where to write; standard output when None.
            interval_s: at most one progress line in this time, off a terminal.
            clock: seconds that never go back.
            live: True for the live screen, False for plain lines; None asks the stream.
        """
        stream = stream or sys.stdout
        self._clock = clock
        self._progress = _Progress(total_steps=total_steps, run_folder=run_folder)
        wants_live = _is_terminal(stream) if live is None else live
        self._display: _Display = _LiveScreen(stream) if wants_live else _PlainLines(stream, interval_s)

    def say(self, text: str) -> None:
        """Print one sentence on one line."""
        self._display.line(printable(text))

    def block(self, text: str) -> None:
        """Print text that was laid out on several lines by us, such as a result table."""
        for line in text.split("\n"):
            self.say(line)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print aligned columns; the first is flush left, the others flush right."""
        cells = [[printable(cell) for cell in row] for row in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for first, *others in cells:
            right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            self._display.line("  ".join([first.ljust(widths[0]), *right]).rstrip())

    def progress(self, record: Record) -> None:
        """Show where the run is. Call it as often as there are records."""
        self._progress.take(record, self._clock())
        self._display.progress(self._progress, self._clock())

    def __enter__(self) -> Self:
        self._display.start(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop(self._progress)


@dataclass
class _Progress:
    """Where the run is: plain state, shared by both displays."""

    total_steps: int | None
    run_folder: str | None
    record: Record | None = None
    known: dict[str, float] = field(default_factory=dict)
    """Latest value of every metric: a record of an evaluation must not blank the loss."""
    eta_s: float | None = None
    _began: tuple[int, float] | None = None

    def take(self, record: Record, now: float) -> None:
        self.record = record
        self.known |= record.values
        if self._began is None:
            self._began = (record.step, now)  # not the start of the run: the first step pays for warm-up
        steps, elapsed = record.step - self._began[0], now - self._began[1]
        if self.total_steps is not None and steps > 0:
            self.eta_s = elapsed / steps * max(0, self.total_steps - record.step)

    @property
    def position(self) -> str:
        step = self.record.step if self.record else 0
        return f"{step}" if self.total_steps is None else f"{step}/{self.total_steps}"

    @property
    def at_end(self) -> bool:
        return self.record is not None and self.total_steps is not None and self.record.step >= self.total_steps


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or not math.isfinite(value) else f"{value:.1f}"


_Shape = Callable[[float], str]
_FIELDS: tuple[tuple[str, str, str, _Shape], ...] = (
    # metric, words of the plain line ({} is the value), title on the live screen, how to write the value
    ("train/loss", "loss {}", "loss", "{:.3f}".format),
    ("train/contrastive_accuracy", "acc {}", "contrastive accuracy", _percent),
    ("eval/knn_top1", "knn {}", "kNN top-1", _percent),
    ("eval/linear_top1", "linear {}", "linear top-1", _percent),
    ("data/images_per_s", "{} img/s", "images/s", _rate),
    ("data/wait_fraction", "wait {}", "data wait", _percent),
    ("train/learning_rate", "lr {}", "learning rate", "{:.1e}".format),
    ("data/rejected_total", "rejected {}", "rejected", "{:,.0f}".format),
    ("data/animated_total", "animated {}", "animated", "{:,.0f}".format),
)
_SILENT_AT_ZERO = ("data/rejected_total", "data/animated_total")
"""On plain lines: none of these is the normal case and needs no words."""


def _progress_line(progress: _Progress, values: Mapping[str, float]) -> str:
    parts = [f"step {progress.position}"]
    for name, words, _, write in _FIELDS:
        if name in values and not (name in _SILENT_AT_ZERO and values[name] == 0):
            parts.append(words.format(write(values[name])))
    if progress.eta_s is not None and not progress.at_end:
        parts.append(f"eta {duration(progress.eta_s)}")
    return "  ".join(parts)


class _Display(Protocol):
    def line(self, text: str) -> None: ...
    def start(self, progress: _Progress) -> None: ...
    def progress(self, progress: _Progress, now: float) -> None: ...
    def stop(self, progress: _Progress) -> None: ...


class _PlainLines:
    """For files, pipes and job logs: the first and the last record, results, and one line each interval between."""

    def __init__(self, stream: TextIO, interval_s: float) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._printed_at: float | None = None
        self._printed: Record | None = None

    def line(self, text: str) -> None:
        _write_line(self._stream, text)

    def start(self, progress: _Progress) -> None:
        pass

    def progress(self, progress: _Progress, now: float) -> None:
        assert progress.record is not None
        is_result = any(name.startswith("eval/") for name in progress.record.values)
        waited = self._printed_at is None or now - self._printed_at >= self._interval_s
        if waited or is_result or progress.at_end:
            self._printed_at = now
            self._print(progress)

    def stop(self, progress: _Progress) -> None:
        if progress.record is not self._printed:
            self._print(progress)  # a run that stops early still says where

    def _print(self, progress: _Progress) -> None:
        assert progress.record is not None
        self._printed = progress.record
        self.line(_progress_line(progress, progress.record.values))


class _LiveScreen:
    """For a terminal: a few lines that stay in place, with sentences scrolling above them."""

    def __init__(self, stream: TextIO) -> None:
        self._console = RichConsole(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    def line(self, text: str) -> None:
        self._console.print(Text(_encodable(text, self._console.file)), soft_wrap=True)

    def start(self, progress: _Progress) -> None:
        # Standard output stays where the caller put it: rich would bring other people's prints onto the screen.
        self._live = Live(
            _screen(progress),
            console=self._console,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def progress(self, progress: _Progress, now: float) -> None:
        if self._live is not None:
            self._live.update(_screen(progress))

    def stop(self, progress: _Progress) -> None:
        if self._live is not None:
            self._live.update(_screen(progress), refresh=True)
            self._live.stop()
            self._live = None


def _screen(progress: _Progress) -> RenderableType:
    """Lay out the live screen: run folder, bar, numbers."""
    numbers = Table.grid(padding=(0, 3))
    known = progress.known
    # Columns stay as they are from the first record on; one of animated images would stand empty in most runs.
    shown = [
        (title, write(known[name]))
        for name, _, title, write in _FIELDS
        if name in known and not (name == "data/animated_total" and known[name] == 0)
    ]
    for _ in shown:
        numbers.add_column(no_wrap=True)
    numbers.add_row(*(Text(title, style="dim") for title, _ in shown))
    numbers.add_row(*(Text(value, style="bold") for _, value in shown))
    parts: list[RenderableType] = [_bar(progress), numbers]
    if progress.run_folder is not None:
        parts.insert(0, Text(f"run {printable(progress.run_folder)}", style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _bar(progress: _Progress) -> RenderableType:
    step = progress.record.step if progress.record else 0
    eta = "" if progress.eta_s is None else f"eta {duration(progress.eta_s)}"
    note = "done" if progress.at_end else eta
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=progress.total_steps, completed=step, width=40, pulse=progress.total_steps is None)
    row.add_row(Text(f"step {progress.position}"), bar, Text(note))
    return row


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _indented(text: object) -> str:
    """Escape each line of `text` and set all but the first two spaces in."""
    return "\n  ".join(printable(line).strip() for line in str(text).split("\n"))


def _encodable(text: str, stream: object) -> str:
    """Escape what the stream's encoding lacks: a log in the C locale must not raise on a stranger's file name."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _write_line(stream: TextIO, text: str) -> None:
    # The reader may close the pipe. metrics.jsonl has everything; the run goes on without an audience.
    with contextlib.suppress(OSError):
        print(_encodable(text, stream), file=stream, flush=True)
