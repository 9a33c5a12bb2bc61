"""The CPU stage of the stream: the encoded images of a unit become two views each, R rows in and R rows out.

A row that does not decode is never dropped, for a dropped row would shift every later batch. It is replaced by the
next row of its unit that does (in planned order, around the end), in views of its own: the c-th use of a sample in
its unit takes views 2c and 2c + 1. The rule knows the unit alone, so it is the same at every world size; the
rejected row is reported beside.

Crops are drawn from the headers, before anything is decoded. Decoded images live for as long as their views are being
made, some at a time or a large one alone, in one piece of memory for all of a unit: where the allocator gives memory
back to the system in between, page faults cost up to 40 % of a large image. (What is turned upright, is no JPEG or is
beyond `_MOST_BYTES` gets memory of its own.)

With `scaled_decode` a JPEG is decoded once at a half, a quarter or an eighth of its size where both crops still have
the view's pixels then; `data/decode.py` says what that wins and changes. The crops are the same boxes, at fractions of
a pixel. It is for antialiased resizing alone: flavour `paper` reads four pixels each way of however many, so that what
it makes of large crops is mostly aliases, of which a reduced image has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from simclr_ray.data.decode import (
    REASONS,
    Decoded,
    Header,
    Limits,
    Pixels,
    Reduction,
    Rejected,
    decode_reduced,
    read_header,
    reduced_size,
    reductions,
)
from simclr_ray.errors import DataError
from simclr_ray.views.draw import Draws, draw
from simclr_ray.views.make import crop, two_views
from simclr_ray.views.policy import Policy

Columns = dict[str, npt.NDArray[np.generic]]
Integers = npt.NDArray[np.int64]
Where = Literal["cpu", "gpu"]
"""`cpu`: the stage makes finished views. `gpu`: it crops, and who trains does the colours (`colours_of`)."""

ACCEPTED = -1
_BYTES_AT_ONCE = 2 << 20
"""Decoded images that are turned into views by one call: some photographs, which stay in the cache, or all of a unit of
small images, for which a call costs as much as an image. A larger image is turned into views alone."""
_MOST_BYTES = 64 << 20
"""The most memory that is kept for decoding during a unit: the largest of its images, up to 22 million pixels."""


@dataclass(frozen=True)
class ViewStage:
    """Header, draw, decode and apply, for Ray Data's `map_batches` over blocks of whole units."""

    policy: Policy
    seed: int
    limits: Limits
    where: Where = "cpu"
    scaled_decode: bool = True

    def __call__(self, block: Columns) -> Columns:
        """Turn the columns `image`, `sample_id`, `unit` and `epoch` into views.

        The columns `use`, `lost_id` and `lost_reason` may be there too: how often the unit's images were used before,
        where they stand in for those of a lost unit, and which images were lost, -1 where none was. The rows of a unit
        follow each other; n are all rows.

        Returns:
            `views` (n, 2, S, S, 3) uint8; `sample_id`, `epoch` and `use` (n,) of the image that was used, which are the
            address of its draws; `unit` as it came; `rejected_id` (n,) and `reason` (n,) of the image that stood here
            before, -1 where it was used; `animated` (n,) bool, whether the image that was used is the first of several
            frames.

        Raises:
            DataError: no row of a unit decodes. Units without a single good header do not come here, for others stand
                in for them (`data/units.py`); so all that have one are broken in their pixels.
        """
        torch.set_num_threads(1)  # Ray runs one such task a CPU; more threads would only compete
        return self.columns(block)

    def columns(self, block: Columns) -> Columns:
        """The same, leaving the process's number of threads alone."""
        size, units = self.policy.size, block["unit"]
        views = np.empty((len(units), 2, size, size, 3), dtype=np.uint8)
        ends = [*(np.flatnonzero(np.diff(units)) + 1).tolist(), len(units)]
        parts = [
            self._unit({name: column[start:end] for name, column in block.items()}, views[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return {"views": views} | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _unit(self, unit: Columns, views: Pixels) -> Columns:
        """Fill `views` (R, 2, S, S, 3) of one unit, and give the other columns."""
        ids, epochs = unit["sample_id"].astype(np.int64), unit["epoch"].astype(np.int64)
        rows = self.read(unit["image"].tolist(), ids, epochs, used=unit.get("use"))
        self._fill(views, np.flatnonzero(rows.reasons == ACCEPTED), np.arange(len(ids)), rows.used, rows)
        accepted = rows.reasons == ACCEPTED
        if not accepted.any():
            names = ", ".join(sorted({REASONS[code] for code in rows.reasons}))
            raise DataError(
                f"none of the {len(accepted)} images of unit {unit['unit'][0]} can be decoded: those with a good "
                "header broke when their pixels were decoded, which no other unit stands in for",
                got=names,
                fix=f"look at the images with sample ids {rows.ids.min()} to {rows.ids.max()}; "
                "`simclr-ray pack` decodes every image and leaves such ones out",
            )
        source, use = replacements(accepted)
        use += rows.used[source]
        if not accepted.all():
            self._fill(views, np.flatnonzero(~accepted), source, use, rows)
            if ((rows.reasons == ACCEPTED) != accepted).any():
                raise DataError(f"an image of unit {unit['unit'][0]} decoded once and not again", fix="run again")
        return {
            "sample_id": rows.ids[source],
            "epoch": rows.epochs[source],
            "use": use,
            "unit": unit["unit"],
            **_reported(unit, rows, accepted),
            "animated": rows.animated[source],
        }

    def read(
        self, encoded: Sequence[bytes | None], ids: Integers, epochs: Integers, *,
        used: npt.NDArray[np.generic] | None = None,
    ) -> Rows:  # fmt: skip
        """Read the headers of n encoded images, whose ids, epochs and earlier uses (none without them) are (n,)."""
        headers = [read_header(data, self.limits) for data in encoded]
        reasons = np.array([_code(header) for header in headers], dtype=np.int8)
        before = np.zeros_like(ids) if used is None else used.astype(np.int64)
        return Rows(encoded, ids, epochs, before, headers, reasons)

    def make(self, rows: Rows) -> Pixels:
        """Views (n, 2, S, S, 3) of each image; undefined where `rows.reasons` says afterwards that it has none."""
        views = np.empty((len(rows.ids), 2, self.policy.size, self.policy.size, 3), dtype=np.uint8)
        everywhere = np.arange(len(rows.ids))
        self._fill(views, np.flatnonzero(rows.reasons == ACCEPTED), everywhere, rows.used, rows)
        return views

    def _fill(self, views: Pixels, places: Integers, source: Integers, use: Integers, rows: Rows) -> None:
        """Make the views at `places` from the rows `source[places]`; what does not decode gets its reason."""
        chosen = source[places]
        sizes = np.array([_size(rows.headers[row]) for row in chosen]).reshape(len(chosen), 2)
        draws = draws_at(
            self.policy, seed=self.seed, epoch=rows.epochs[chosen], sample_ids=rows.ids[chosen], sizes=sizes,
            use=use[places],
        )  # fmt: skip
        make = two_views if self.where == "cpu" else crop
        never: list[Reduction] = [1] * len(chosen)
        wanted = wanted_reductions(draws, self.policy) if self.scaled_decode else never
        for group, images in _decoded(chosen, rows, self.limits, wanted):
            views[places[group]] = make(images, draws[group], self.policy)


@dataclass(frozen=True)
class Rows:
    """Images on their way to views."""

    encoded: Sequence[bytes | None]
    ids: Integers
    epochs: Integers
    used: Integers
    """How often each was used before, in this epoch."""
    headers: Sequence[Header | Rejected]
    reasons: npt.NDArray[np.int8]
    """`ACCEPTED`, or the number of the reason against it; what fails to decode is noted here as it is found."""

    @property
    def animated(self) -> npt.NDArray[np.bool_]:
        """(n,) whether the file has several frames."""
        return np.array([isinstance(header, Header) and header.animated for header in self.headers])


def _reported(unit: Columns, rows: Rows, accepted: npt.NDArray[np.bool_]) -> Columns:
    """`rejected_id` and `reason` of each place: the image that was lost here, else the one that does not decode."""
    rejected, reasons = np.where(accepted, -1, rows.ids), rows.reasons
    if "lost_id" in unit:
        lost = unit["lost_id"].astype(np.int64)
        rejected = np.where(lost >= 0, lost, rejected)
        reasons = np.where(lost >= 0, unit["lost_reason"].astype(np.int8), reasons)
    return {"rejected_id": rejected, "reason": reasons}


def draws_at(
    policy: Policy, *, seed: int, epoch: Integers, sample_ids: Integers, sizes: Integers, use: Integers
) -> Draws:
    """Draws (n, 2) of the c-th use of each sample: views 2c and 2c + 1."""
    draws = draw(policy, seed=seed, epoch=epoch, sample_ids=sample_ids, sizes=sizes)
    for count in np.unique(use[use > 0]).tolist():
        again = np.flatnonzero(use == count)
        drawn = draw(
            policy, seed=seed, epoch=epoch[again], sample_ids=sample_ids[again], sizes=sizes[again],
            first_view=2 * count,
        )  # fmt: skip
        for field in fields(Draws):
            getattr(draws, field.name)[again] = getattr(drawn, field.name)
    return draws


def wanted_reductions(draws: Draws, policy: Policy) -> list[Reduction]:
    """By how much each of n images may be reduced when it is decoded, for draws (n, views)."""
    if policy.flavour == "paper":
        return [1] * len(draws)
    boxes = np.stack([draws.top, draws.left, draws.height, draws.width], axis=-1)
    return cast("list[Reduction]", reductions(boxes, policy.size).tolist())


def _decoded(
    chosen: Integers, rows: Rows, limits: Limits, wanted: Sequence[Reduction]
) -> Iterator[tuple[list[int], list[Decoded]]]:
    """Groups of images that decode, and their indices in `chosen`; valid until the next group."""
    needed = [_decoded_bytes(rows.headers[row], factor) for row, factor in zip(chosen.tolist(), wanted, strict=True)]
    largest = max((size for size in needed if size <= _MOST_BYTES), default=0)
    memory = np.empty(max(_BYTES_AT_ONCE, largest), dtype=np.uint8)
    group: list[int] = []
    images: list[Decoded] = []
    used = 0
    for index, row in enumerate(chosen.tolist()):
        data, header = rows.encoded[row], rows.headers[row]
        assert data is not None
        assert not isinstance(header, Rejected)
        if images and used + needed[index] > _BYTES_AT_ONCE:
            yield group, images
            group, images, used = [], [], 0
        image = decode_reduced(data, header, limits, reduction=wanted[index], buffer=memory[used:])
        if isinstance(image, Rejected):
            rows.reasons[row] = _code(image)
            continue
        group.append(index)
        images.append(image)
        used = min(used + needed[index], len(memory))
    if images:
        yield group, images


def replacements(accepted: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """Which row stands at each place of a unit, and how often that row was used before it.

    Args:
        accepted: (R,), at least one of them true.

    Returns:
        (R,) row numbers and (R,) use counts.
    """
    rows = np.flatnonzero(accepted)
    assert len(rows)
    # The next accepted row at or after each place, around the end.
    source = rows[np.searchsorted(rows, np.arange(len(accepted))) % len(rows)]
    use = np.zeros(len(accepted), dtype=np.int64)
    # The row's own place is use 0; the places that borrow it count on from there in planned order.
    borrowers: dict[int, int] = {}
    for place in np.flatnonzero(~accepted):
        borrowers[source[place]] = use[place] = borrowers.get(source[place], 0) + 1
    return source.astype(np.int64), use


def _size(header: Header | Rejected) -> tuple[int, int]:
    assert not isinstance(header, Rejected)
    return header.height, header.width


def _decoded_bytes(header: Header | Rejected, wanted: Reduction) -> int:
    assert not isinstance(header, Rejected)
    _, height, width = reduced_size(header, wanted)
    return 3 * height * width


def _code(image: object) -> int:
    return REASONS.index(image.reason) if isinstance(image, Rejected) else ACCEPTED
