"""The similarity matrix of NT-Xent, a tile at a time: sums over the negatives, and the gradient through them.

No collective and no autograd here, and nothing of the size (rows x columns): a tile is made in a buffer, used up, and
made again when the gradient needs it. Rows and columns are unit projections by view, (2, n, D) and (2, k, D). The
matrix is symmetric, so a tile can serve its rows and, read the other way, its columns: one product and one exp for
both (`mirrored`).

With s_ij = z_i . z_j / temperature and A(i) the negatives of anchor i (all but itself and its positive)::

    neg_i = sum_{j in A(i)} exp(s_ij)                 w_i = 1 / (neg_i + exp(s_i,positive))
    d(sum of losses)/dz_i = 1/temperature * (sum_{j in A(i)} exp(s_ij) (w_i + w_j) z_j - positives' part)

Positives stay out of the sums, because p - 1 cancels once the positive wins (`learn.nt_xent` adds their part), and
self-similarity stays out by its place on the diagonal, never by subtraction.

`TorchTiles` needs no running maximum while |s| <= 1 / temperature keeps exp(s) and sums of millions of it inside
float32; below that temperature `wide` keeps one a row, the online log-sum-exp, at a second exp a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LN_2 = math.log(2.0)
ALL_QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Pairs of (row view, column view)."""

LARGEST_PLAIN_LOGIT = 70.0
"""exp(70) times 10^7 rows is 10^37.4, within float32's 10^38.5; exp(-70) is a normal number."""


class RowSums(NamedTuple):
    """What the rows have met so far, by view; updated in place, also through the slices that `images` gives."""

    totals: Tensor
    """(3, 2, n) float64: sums of exp(s - shift[0]) over negatives of the row's own view, of exp(s - shift[1]) over
    those of the other view, and of s exp(s - shift[1]) over the latter."""
    hardest: Tensor
    """(2, n): largest logit among the negatives of the other view."""
    shift: Tensor
    """(2, 2, n): zeros, or the running maxima of the own view's and of the other view's logits where `wide`. Two,
    because with one the view of the smaller logits would underflow, and the statistics look at one view only."""

    def images(self, images: slice) -> RowSums:
        """The same for some images only, sharing memory."""
        return RowSums(self.totals[:, :, images], self.hardest[:, images], self.shift[:, :, images])

    def rescale_(self, shift: Tensor) -> None:
        """Move to another (2, 2, n) shift."""
        factor = (self.shift - shift).double().exp()
        self.totals[0].mul_(factor[0])
        self.totals[1:].mul_(factor[1])
        self.shift.copy_(shift)


class Kernel(Protocol):
    """How the tiles are computed. Rows (2, n, D) and columns (2, k, D) are unit vectors of one dtype and device."""

    wide: bool

    def new_sums(self, images: int, like: Tensor) -> RowSums:
        """Sums over nothing."""

    def add_own(self, rows: Tensor, sums: RowSums) -> None:
        """Take all pairs within `rows`."""

    def add_block(
        self, rows: Tensor, columns: Tensor, row_sums: RowSums, column_sums: RowSums | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """Take all pairs of other images, by view; `column_sums` receive the mirrored pairs."""

    def own_gradient(self, rows: Tensor, normalizer: Tensor, gradient: Tensor) -> None:
        """Add sum_j exp(s_ij) (w_i + w_j) z_j over the pairs within `rows` to `gradient` (2, n, D).

        `normalizer` is (2, n): w, or -log w where `wide`.
        """

    def block_gradient(
        self, rows: Tensor, columns: Tensor, row_normalizer: Tensor, column_normalizer: Tensor,
        row_gradient: Tensor, column_gradient: Tensor | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """The same over pairs of other images."""


class Tile(NamedTuple):
    """One piece of the matrix, by the numbers of its row span and its column span."""

    row_view: int
    rows: int
    column_view: int
    columns: int
    diagonal: bool
    """The pairs on the diagonal are no negatives: an anchor and itself, or an anchor and its positive."""
    mirrored: bool
    """The columns take the pairs as well."""


def own_tiles(spans: int) -> Iterator[Tile]:
    """Every unordered pair of the 2n rows once: each view's upper triangle, and view a against view b.

    A tile on a triangle's diagonal holds its pairs twice, (i, j) and (j, i), so it is not mirrored.
    """
    for view in (0, 1):
        for rows in range(spans):
            for columns in range(rows, spans):
                yield Tile(view, rows, view, columns, rows == columns, rows != columns)
    for rows in range(spans):
        for columns in range(spans):
            yield Tile(0, rows, 1, columns, rows == columns, True)


def block_tiles(
    row_spans: int, column_spans: int, quadrants: Iterable[tuple[int, int]], *, mirrored: bool
) -> Iterator[Tile]:
    """Every pair of an image here and an image there, in the given quadrants."""
    for row_view, column_view in quadrants:
        for columns in range(column_spans):
            for rows in range(row_spans):
                yield Tile(row_view, rows, column_view, columns, False, mirrored)


class TorchTiles:
    """`Kernel` in plain torch operations, for any device and dtype. Scratch is two tiles, three for the gradient.

    A tile costs tens of microseconds of Python; everything that can be cut into spans once is, outside the loops.
    """

    def __init__(self, temperature: float, size: int) -> None:
        """Take tiles of at most `size` rows and columns."""
        self._inverse_temperature = 1.0 / temperature
        self._size = size
        self.wide = self._inverse_temperature > LARGEST_PLAIN_LOGIT
        # Powers of 2 take a CPU less than half the time of powers of e (86 against 220 us a tile on one core).
        self._scale = self._inverse_temperature if self.wide else self._inverse_temperature / _LN_2
        self._memory: dict[int, Tensor] = {}

    def new_sums(self, images: int, like: Tensor) -> RowSums:
        """See `Kernel`."""
        totals = like.new_zeros((3, 2, images), dtype=torch.float64)
        # No logit is smaller than -1/temperature, so a shift that starts there never makes inf - inf.
        shift = like.new_full((2, 2, images), -self._inverse_temperature if self.wide else 0.0)
        return RowSums(totals, like.new_full((2, images), -math.inf), shift)

    def add_own(self, rows: Tensor, sums: RowSums) -> None:
        """See `Kernel`."""
        spans = self._spans(rows)
        lines = self._lines(sums)
        self._add(own_tiles(len(spans[0])), spans, spans, lines, lines)

    def add_block(
        self, rows: Tensor, columns: Tensor, row_sums: RowSums, column_sums: RowSums | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """See `Kernel`."""
        x, y = self._spans(rows), self._spans(columns)
        tiles = block_tiles(len(x[0]), len(y[0]), quadrants, mirrored=column_sums is not None)
        self._add(tiles, x, y, self._lines(row_sums), [] if column_sums is None else self._lines(column_sums))

    def own_gradient(self, rows: Tensor, normalizer: Tensor, gradient: Tensor) -> None:
        """See `Kernel`."""
        x, w, dx = self._spans(rows), self._spans(normalizer), self._spans(gradient)
        self._differentiate(own_tiles(len(x[0])), x, x, w, w, dx, dx)

    def block_gradient(
        self, rows: Tensor, columns: Tensor, row_normalizer: Tensor, column_normalizer: Tensor,
        row_gradient: Tensor, column_gradient: Tensor | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """See `Kernel`."""
        x, y = self._spans(rows), self._spans(columns)
        tiles = block_tiles(len(x[0]), len(y[0]), quadrants, mirrored=column_gradient is not None)
        self._differentiate(
            tiles, x, y, self._spans(row_normalizer), self._spans(column_normalizer), self._spans(row_gradient),
            [] if column_gradient is None else self._spans(column_gradient),
        )  # fmt: skip

    def _add(
        self, tiles: Iterable[Tile], x: list[list[Tensor]], y: list[list[Tensor]],
        row_lines: list[list[_Line]], column_lines: list[list[_Line]],
    ) -> None:  # fmt: skip
        add = _add_wide if self.wide else _add_plain
        for tile in tiles:
            logits = self._logits(x[tile.row_view][tile.rows], y[tile.column_view][tile.columns])
            scratch = self._buffer(1, logits)
            receivers = [(1, row_lines[tile.row_view][tile.rows])]
            if tile.mirrored:
                receivers.append((0, column_lines[tile.column_view][tile.columns]))
            add(logits, scratch, receivers, cross=tile.row_view != tile.column_view, diagonal=tile.diagonal)

    def _differentiate(
        self, tiles: Iterable[Tile], x: list[list[Tensor]], y: list[list[Tensor]], row_w: list[list[Tensor]],
        column_w: list[list[Tensor]], dx: list[list[Tensor]], dy: list[list[Tensor]],
    ) -> None:  # fmt: skip
        weigh = _weigh_wide if self.wide else _weigh_plain
        for tile in tiles:
            rows, columns = x[tile.row_view][tile.rows], y[tile.column_view][tile.columns]
            logits = self._logits(rows, columns)
            one, two = self._buffer(1, logits), self._buffer(2, logits)
            w_i, w_j = row_w[tile.row_view][tile.rows].unsqueeze(1), column_w[tile.column_view][tile.columns]
            weights = weigh(logits, w_i, w_j, one, two)
            if tile.diagonal:
                weights.fill_diagonal_(0.0)
            target = dx[tile.row_view][tile.rows]
            torch.addmm(target, weights, columns, out=target)
            if tile.mirrored:
                target = dy[tile.column_view][tile.columns]
                torch.addmm(target, weights.T, rows, out=target)

    def _logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits of a tile, (p, q), in a buffer that the next call uses again; in base 2 unless `wide`."""
        logits = self._buffer(0, rows[:1, :1].expand(len(rows), len(columns)))
        # beta = 0 ignores what the buffer held, also NaN.
        return torch.addmm(logits, rows, columns.T, beta=0.0, alpha=self._scale, out=logits)

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        """One of the tiles' buffers, in the shape, dtype and device of `like`; as large as the largest tile so far."""
        memory = self._memory.get(number)
        if memory is None or len(memory) < like.numel():
            memory = self._memory[number] = like.new_empty(like.numel())
        return memory[: like.numel()].view(like.shape)

    def _spans(self, x: Tensor) -> list[list[Tensor]]:
        """Views of x (2, n, ...) in spans of the tile's size, by view; none where n is 0."""
        return [list(view.split(self._size)) if len(view) else [] for view in x]

    def _lines(self, sums: RowSums) -> list[list[_Line]]:
        parts = [self._spans(part) for part in (*sums.totals, sums.hardest, *sums.shift)]
        return [[_Line(*pieces) for pieces in zip(*(part[view] for part in parts), strict=True)] for view in (0, 1)]


class _Line(NamedTuple):
    """Part of a `RowSums`: one span of images in one view; each (p,)."""

    same: Tensor
    cross: Tensor
    cross_times_logit: Tensor
    hardest: Tensor
    same_shift: Tensor
    cross_shift: Tensor


_Receivers = Sequence[tuple[int, _Line]]
"""The dimension to sum a tile over, and the line that takes the sums."""


def _add_plain(logits: Tensor, scratch: Tensor, receivers: _Receivers, *, cross: bool, diagonal: bool) -> None:
    """Add a tile of logits in base 2, which are used up, to its receivers."""
    if cross:
        if diagonal:
            logits.fill_diagonal_(-math.inf)
        for dim, line in receivers:
            torch.maximum(line.hardest, logits.amax(dim).mul_(_LN_2), out=line.hardest)
        if diagonal:
            logits.fill_diagonal_(0.0)  # as -inf * 0 below would be NaN
    terms = torch.exp2(logits, out=scratch)
    if diagonal:
        terms.fill_diagonal_(0.0)
    for dim, line in receivers:
        (line.cross if cross else line.same).add_(terms.sum(dim))
    if cross:
        terms.mul_(logits)
        for dim, line in receivers:
            line.cross_times_logit.add_(terms.sum(dim), alpha=_LN_2)


def _add_wide(logits: Tensor, scratch: Tensor, receivers: _Receivers, *, cross: bool, diagonal: bool) -> None:
    """`_add_plain` with the running maximum of each row, and so an exp of its own for each receiver."""
    if diagonal:
        logits.fill_diagonal_(-math.inf)
    for dim, line in receivers:
        peak = logits.amax(dim)
        running = line.cross_shift if cross else line.same_shift
        shift = torch.maximum(running, peak)
        shrink = (running - shift).double().exp_()
        running.copy_(shift)
        torch.sub(logits, shift.unsqueeze(dim), out=scratch).exp_()
        if not cross:
            line.same.mul_(shrink).add_(scratch.sum(dim))
            continue
        torch.maximum(line.hardest, peak, out=line.hardest)
        line.cross.mul_(shrink).add_(scratch.sum(dim))
        scratch.mul_(logits)
        if diagonal:
            scratch.fill_diagonal_(0.0)  # for 0 * -inf
        line.cross_times_logit.mul_(shrink).add_(scratch.sum(dim))


def _weigh_plain(logits: Tensor, w_i: Tensor, w_j: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """exp(s) (w_i + w_j): one power serves both directions. `w_i` is (p, 1), `w_j` (q,)."""
    return torch.exp2(logits, out=one).mul_(torch.add(w_i, w_j, out=two))


def _weigh_wide(logits: Tensor, lse_i: Tensor, lse_j: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """exp(s - lse_i) + exp(s - lse_j), each at most 1."""
    return torch.sub(logits, lse_i, out=one).exp_().add_(torch.sub(logits, lse_j, out=two).exp_())
