"""Pictures of a run: sheets of views and neighbours, curves, and bars of the result table, as PNG files.

Images are uint8 arrays (H, W, 3), (H, W, 1) or (H, W). matplotlib is imported when a picture is asked for, and used
without pyplot: no global state, no display. Class names come from strangers: they are escaped and never read as
mathematics.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.table import EvaluationRow
from simclr_ray.observe.console import printable
from simclr_ray.observe.metrics import Record

Image = npt.NDArray[np.uint8]
PathLike = str | os.PathLike[str]

# Okabe & Ito's palette: told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _RED, _GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
_CELL, _GAP, _MARGIN = 1.1, 0.12, 0.25  # inches
_HEAD, _LEGEND, _NOTE = 0.55, 0.3, 0.24  # inches: title with column headings, a line of legend, text under an image
_DPI = 130
_MAX_PAIRS = 64
_NEAREST_UP_TO = 112  # pixels: smaller images are shown with their pixels, larger ones smoothed


def views_sheet(images: Sequence[Image], views: Image, path: PathLike, *, title: str = "What the encoder sees") -> None:
    """Draw each image beside its two views: the first thing to look at when a policy changes.

    Args:
        images: n images of any size, 1 <= n <= 64.
        views: their view pairs, (n, 2, S, S, 3) or (n, 2, S, S), uint8.
        path: the PNG to write; folders are made.
        title: one line above.

    Raises:
        DataError: the number of images and view pairs differ, or is out of range.
        ConfigError: matplotlib is not installed.
    """
    views = np.asarray(views)
    if not 1 <= len(images) <= _MAX_PAIRS or views.shape[:2] != (len(images), 2):
        raise DataError(
            "a views sheet needs one view pair for each image",
            got=f"{len(images)} images, views of shape {views.shape}",
            expected=f"n images and views (n, 2, S, S, 3), 1 <= n <= {_MAX_PAIRS}",
        )
    groups = max(1, round(math.sqrt(len(images) / 2)))  # triples side by side, for a sheet about as wide as high
    num_rows = math.ceil(len(images) / groups)
    group_width = 3 * _CELL + 2 * _GAP
    figure = _figure(
        width=2 * _MARGIN + groups * group_width + (groups - 1) * 4 * _GAP,
        height=2 * _MARGIN + _HEAD + num_rows * (_CELL + _GAP),
    )
    _title(figure, title)
    top = figure.get_figheight() - _MARGIN - _HEAD
    for i, (image, pair) in enumerate(zip(images, views, strict=True)):
        group, row = divmod(i, num_rows)  # down, then right
        left = _MARGIN + group * (group_width + 4 * _GAP)
        y = top - row * (_CELL + _GAP)
        for column, (name, picture) in enumerate(zip(("image", "view a", "view b"), (image, *pair), strict=True)):
            _image(figure, picture, left + column * (_CELL + _GAP), y)
            if row == 0:
                _heading(figure, name, left + column * (_CELL + _GAP), y)
    _save(figure, path)


def neighbour_sheet(
    queries: Sequence[Image],
    neighbours: Sequence[Sequence[Image]],
    path: PathLike,
    *,
    query_labels: Sequence[int] | None = None,
    neighbour_labels: Sequence[Sequence[int]] | None = None,
    class_names: Sequence[str] | None = None,
    similarity: Sequence[Sequence[float]] | None = None,
    title: str = "Nearest neighbours by cosine similarity",
) -> None:
    """Draw each query and its neighbours, nearest first; `simclr_ray.evaluate.knn.nearest` finds them.

    With labels of both, a neighbour of the query's class has a solid green frame, another a dashed red one.

    Args:
        queries: n images, 1 <= n <= 64.
        neighbours: n rows of k images, k the same in each row.
        path: the PNG to write; folders are made.
        query_labels: n class numbers.
        neighbour_labels: n rows of k class numbers.
        class_names: names by class number; numbers are shown without them.
        similarity: n rows of k cosine similarities, shown under the images.
        title: one line above.

    Raises:
        DataError: numbers of rows or columns do not fit.
        ConfigError: matplotlib is not installed.
    """
    tables = {"neighbours": neighbours, "neighbour labels": neighbour_labels, "similarities": similarity}
    _check_rows(len(queries), tables, query_labels)
    framed = query_labels is not None and neighbour_labels is not None
    head = _HEAD + (_LEGEND if framed else 0.0)
    pitch = _CELL + _GAP + (_NOTE if query_labels is not None or similarity is not None else 0.0)
    figure = _figure(
        width=2 * _MARGIN + (len(neighbours[0]) + 1) * (_CELL + _GAP) + 2 * _GAP,
        height=2 * _MARGIN + head + len(queries) * pitch,
    )
    _title(figure, title)
    if framed:
        _frame_legend(figure)
    top = figure.get_figheight() - _MARGIN - head
    for row, query in enumerate(queries):
        y = top - row * pitch
        axes = _image(figure, query, _MARGIN, y)
        if row == 0:
            _heading(figure, "query", _MARGIN, y)
        if query_labels is not None:
            _note(axes, _class_name(query_labels[row], class_names))
        for column, image in enumerate(neighbours[row]):
            left = _MARGIN + (column + 1) * (_CELL + _GAP) + 2 * _GAP
            axes = _image(figure, image, left, y)
            if row == 0:
                _heading(figure, f"{column + 1}", left, y)
            if query_labels is not None and neighbour_labels is not None:
                _frame(axes, correct=neighbour_labels[row][column] == query_labels[row])
            if similarity is not None:
                _note(axes, f"{similarity[row][column]:.2f}")
    _save(figure, path)


def curves(
    records: Sequence[Record], path: PathLike, *, title: str = "Training", measured: Sequence[Record] = ()
) -> None:
    """Draw loss, contrastive accuracy (with the kNN accuracy), learning rate and throughput against images seen.

    Thin lines are the values, strong ones their running mean; a dotted line marks where a new attempt resumed.

    Args:
        records: what `read_jsonl` returns; values that are missing or NaN leave gaps.
        path: the PNG to write; folders are made.
        title: one line above.
        measured: what was measured of checkpoints meanwhile, see `evaluate.online.online_records`.

    Raises:
        DataError: there are no records.
        ConfigError: matplotlib is not installed.
    """
    if not records:
        raise DataError("there are no records to draw", fix="train for a few steps first, or check the path")
    figure = _figure(width=11, height=7)
    figure.suptitle(printable(title), x=0.012, ha="left", fontsize=14, parse_math=False)
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, sharex=True)
    _curve(loss, records, "train/loss", _BLUE)
    loss.set_title("NT-Xent loss (nat)", fontsize=11, loc="left")
    _curve(accuracy, records, "train/contrastive_accuracy", _BLUE, scale=100, label="contrastive, training batch")
    also = [*records, *measured]
    _curve(accuracy, also, "eval/knn_top1", _ORANGE, scale=100, label="kNN top-1, held out", marker="o")
    accuracy.set_title("Accuracy (%)", fontsize=11, loc="left")
    _curve(rate, records, "train/learning_rate", _BLUE, smooth=False)
    rate.set_title("Learning rate", fontsize=11, loc="left")
    _curve(speed, records, "data/images_per_s", _BLUE)
    speed.set_title("Images per second", fontsize=11, loc="left", color=_BLUE)
    wait = speed.twinx()
    _curve(wait, records, "data/wait_fraction", _ORANGE, scale=100)
    wait.set_title("waiting for data (%)", fontsize=11, loc="right", color=_ORANGE)
    for axes in (loss, accuracy, rate, speed):
        _tidy(axes)
        for seen in _resumed_at(records):
            axes.axvline(seen, color=_GRAY, linestyle=":", linewidth=1)
    rate.yaxis.set_major_formatter("{x:.2g}")
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
    accuracy.set_ylim(0, 100)
    wait.set_ylim(0, 100)
    wait.spines["top"].set_visible(False)
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(frameon=False, fontsize=9)
    for axes in (rate, speed):
        axes.set_xlabel("images seen")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_engineering())
    figure.tight_layout(w_pad=3, h_pad=2)
    _save(figure, path)


def comparison_bars(rows: Sequence[EvaluationRow], path: PathLike, *, title: str = "What training added") -> None:
    """Draw the kNN and linear-probe accuracies of the result table as grouped bars, spread as a whisker.

    Args:
        rows: the rows of the result table.
        path: the PNG to write; folders are made.
        title: one line above.

    Raises:
        DataError: no row has an accuracy.
        ConfigError: matplotlib is not installed.
    """
    measures = _accuracies(rows)
    if not measures:
        raise DataError("no row has an accuracy to draw")
    figure = _figure(width=max(6.0, 1.6 + 1.1 * len(rows) * len(measures)), height=4.2)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, (row, colour) in enumerate(zip(rows, _palette(len(rows)), strict=True)):
        offset = (i - (len(rows) - 1) / 2) * width
        bars = [(j + offset, *values[i]) for j, values in enumerate(measures.values()) if values[i] is not None]
        if not bars:
            continue
        x, mean, spread = (np.asarray(column) for column in zip(*bars, strict=True))
        axes.bar(x, 100 * mean, 0.92 * width, yerr=100 * spread, color=colour, label=printable(row.name), capsize=3)
        for at, height, whisker in zip(x, 100 * mean, 100 * np.nan_to_num(spread), strict=True):
            tip = (at, height + whisker)
            axes.annotate(f"{height:.1f}", tip, (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(measures)), [printable(name) for name in measures])
    axes.set_ylim(0, 108)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.tick_params(axis="x", length=0)
    _tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_title(printable(title), fontsize=13, loc="left", pad=26, parse_math=False)
    axes.legend(frameon=False, fontsize=9, ncols=len(rows), loc="lower left", bbox_to_anchor=(0, 1.0))
    figure.tight_layout()
    _save(figure, path)


def _check_rows(
    num_queries: int, tables: Mapping[str, Sequence[Sequence[object]] | None], query_labels: Sequence[int] | None
) -> None:
    """Raise `DataError` unless each table has a row a query, all as wide as the row of neighbours."""
    num_neighbours = len(next(iter(tables["neighbours"] or ()), ()))
    if not 1 <= num_queries <= _MAX_PAIRS or num_neighbours < 1:
        raise DataError(f"a neighbour sheet needs 1 to {_MAX_PAIRS} queries with neighbours", got=num_queries)
    for name, rows in tables.items():
        if rows is not None and [len(row) for row in rows] != [num_neighbours] * num_queries:
            raise DataError(f"each query needs a row of {num_neighbours} {name}", got=[len(row) for row in rows])
    if query_labels is not None and len(query_labels) != num_queries:
        raise DataError("each query needs one label", got=f"{len(query_labels)} labels for {num_queries} queries")


def _accuracies(rows: Sequence[EvaluationRow]) -> dict[str, list[Any]]:
    """Collect (mean, spread), or None, of each row by measure; measures that no row has are left out."""
    measures: dict[str, list[Any]] = {
        "kNN": [None if row.knn_top1 is None else (row.knn_top1, math.nan) for row in rows]
    }
    for labels in dict.fromkeys(labels for row in rows for labels in row.linear):
        summaries = [row.linear.get(labels) for row in rows]
        measures[f"linear, {labels}"] = [None if s is None else (s.mean, s.spread) for s in summaries]
    return {name: values for name, values in measures.items() if any(values)}


def _palette(count: int) -> Iterator[str]:
    """Give baselines pale colours and the last row, the trained encoder, the strong one."""
    pale = ("#BDBDBD", "#8DB9D6", "#C9B38C", "#A8C9A0")
    yield from (pale[i % len(pale)] for i in range(count - 1))
    yield _BLUE


def _curve(
    axes: Any,
    records: Sequence[Record],
    name: str,
    colour: str,
    *,
    scale: float = 1.0,
    label: str | None = None,
    marker: str | None = None,
    smooth: bool = True,
) -> None:
    """Draw one metric where it was recorded; long curves get a running mean over a pale line."""
    points = [(record.samples_seen, scale * record.values[name]) for record in records if name in record.values]
    if not points:
        return
    x, y = map(np.asarray, zip(*points, strict=True))
    if not smooth or len(y) < 100:
        axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker=marker, markersize=4)
        return
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(x, _running_mean(y, half_window=len(y) // 80), color=colour, linewidth=1.8, label=label)


def _running_mean(values: npt.NDArray[np.float64], half_window: int) -> npt.NDArray[np.float64]:
    """Average each value with its neighbours up to `half_window` away; NaN is left out, the ends use what there is."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    here = np.arange(len(values))
    low, high = np.maximum(here - half_window, 0), np.minimum(here + half_window + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _resumed_at(records: Sequence[Record]) -> list[int]:
    return [b.samples_seen for a, b in itertools.pairwise(records) if b.attempt != a.attempt]


def _tidy(axes: Any) -> None:
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _image(figure: Any, image: Image, left: float, top: float) -> Any:
    """Place one image in a square cell with its top left corner at (left, top), in inches from the lower left."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    axes = figure.add_axes((left / width, (top - _CELL) / height, _CELL / width, _CELL / height))
    picture = np.asarray(image)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
        raise DataError(
            "cannot draw this as an image",
            got=f"{picture.dtype} of shape {picture.shape}",
            expected="uint8 of shape (H, W, 3), (H, W, 1) or (H, W)",
        )
    smoothing = "nearest" if max(picture.shape[:2]) <= _NEAREST_UP_TO else "antialiased"
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _heading(figure: Any, text: str, left: float, top: float) -> None:
    """Name the column of the cell with this top left corner, at one height whatever the shape of the image."""
    x, y = (left + _CELL / 2) / figure.get_figwidth(), (top + 0.06) / figure.get_figheight()
    figure.text(x, y, text, fontsize=9, color=_GRAY, ha="center", va="bottom")


def _frame(axes: Any, *, correct: bool) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=2.5, color=_GREEN if correct else _RED, linestyle="-" if correct else "--")


def _frame_legend(figure: Any) -> None:
    """Explain the frames under the title."""
    y = 1 - (_MARGIN + 0.38) / figure.get_figheight()
    left = _MARGIN / figure.get_figwidth()
    figure.text(left, y, "solid green: same class", fontsize=9, color=_GREEN, va="center")
    figure.text(left + 1.7 / figure.get_figwidth(), y, "dashed red: other class", fontsize=9, color=_RED, va="center")


def _note(axes: Any, text: str) -> None:
    axes.set_xlabel(text, fontsize=8, color=_GRAY, labelpad=3, parse_math=False)


def _class_name(label: int, names: Sequence[str] | None) -> str:
    """Name a class within the width of a cell."""
    name = printable(names[label]) if names is not None and 0 <= label < len(names) else f"class {label}"
    return name if len(name) <= 16 else name[:13] + "..."


def _title(figure: Any, title: str) -> None:
    left, top = _MARGIN / figure.get_figwidth(), 1 - _MARGIN / figure.get_figheight()
    figure.text(left, top, printable(title), fontsize=13, va="top", ha="left", parse_math=False)


def _figure(*, width: float, height: float) -> Any:
    """Make a figure of so many inches that draws into memory, whatever backend the user's matplotlib has."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib", got=str(error), fix="pip install simclr-ray[pictures]") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _save(figure: Any, path: PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
