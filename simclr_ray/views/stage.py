"""The CPU stage of the stream: the encoded images of one unit become two views each, R rows in and R rows out.

A row that does not decode is never dropped, for a dropped row would shift every later batch. It is replaced by the
next row of its unit that does (in planned order, around the end), in views of its own: the c-th use of a sample in
its unit takes views 2c and 2c + 1. The rule knows the unit alone, so it is the same at every world size; the
rejected row is reported beside.

Crops are drawn from the headers, before anything is decoded. Decoded images live for as long as their views are being
made, some at a time in one piece of memory: fresh memory costs page faults worth up to 40 % of a large image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from simclr_ray.data.decode import REASONS, Header, Limits, Pixels, Rejected, decode_reduced, read_header
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
small images, for which a call costs as much as an image."""


@dataclass(frozen=True)
class ViewStage:
    """Header, draw, decode and apply, for Ray Data's `map_batches` over whole units."""

    policy: Policy
    seed: int
    limits: Limits
    where: Where = "cpu"

    def __call__(self, unit: Columns) -> Columns:
        """Turn the columns `image`, `sample_id`, `unit` and `epoch` into views.

        Returns:
            `views` (R, 2, S, S, 3) uint8; `sample_id`, `epoch` and `use` (R,) of the image that was used, which are the
            address of its draws; `unit` as it came; `rejected_id` (R,) and `reason` (R,) of the image that stood here
            before, -1 where it was used.

        Raises:
            DataError: no row of the unit decodes.
        """
        torch.set_num_threads(1)  # Ray runs one such task a CPU; more threads would only compete
        return self.columns(unit)

    def columns(self, unit: Columns) -> Columns:
        """The same, leaving the process's number of threads alone."""
        rows = self.read(unit["image"].tolist(), unit["sample_id"].astype(np.int64), unit["epoch"].astype(np.int64))
        views = self.make(rows)
        accepted = rows.reasons == ACCEPTED
        if not accepted.any():
            names = ", ".join(sorted({REASONS[code] for code in rows.reasons}))
            raise DataError(
                f"none of the {len(accepted)} images of unit {unit['unit'][0]} can be decoded",
                got=names,
                fix="look at the images with sample ids from " + str(rows.ids.min()),
            )
        source, use = replacements(accepted)
        if not accepted.all():
            self._fill(views, np.flatnonzero(~accepted), source, use, rows)
            if ((rows.reasons == ACCEPTED) != accepted).any():
                raise DataError(f"an image of unit {unit['unit'][0]} decoded once and not again", fix="run again")
        return {
            "views": views,
            "sample_id": rows.ids[source],
            "epoch": rows.epochs[source],
            "use": use,
            "unit": unit["unit"],
            "rejected_id": np.where(accepted, -1, rows.ids),
            "reason": rows.reasons,
        }

    def read(self, encoded: Sequence[bytes | None], ids: Integers, epochs: Integers) -> Rows:
        """Read the headers of n encoded images, whose ids and epochs are (n,)."""
        headers = [read_header(data, self.limits) for data in encoded]
        return Rows(encoded, ids, epochs, headers, np.array([_code(header) for header in headers], dtype=np.int8))

    def make(self, rows: Rows) -> Pixels:
        """Views (n, 2, S, S, 3) of each image; undefined where `rows.reasons` says afterwards that it has none."""
        views = np.empty((len(rows.ids), 2, self.policy.size, self.policy.size, 3), dtype=np.uint8)
        everywhere = np.arange(len(rows.ids))
        self._fill(views, np.flatnonzero(rows.reasons == ACCEPTED), everywhere, np.zeros_like(everywhere), rows)
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
        for group, images in _decoded(chosen, rows, self.limits):
            views[places[group]] = make(images, draws[group], self.policy)


@dataclass(frozen=True)
class Rows:
    """Images on their way to views."""

    encoded: Sequence[bytes | None]
    ids: Integers
    epochs: Integers
    headers: Sequence[Header | Rejected]
    reasons: npt.NDArray[np.int8]
    """`ACCEPTED`, or the number of the reason against it; what fails to decode is noted here as it is found."""


def draws_at(
    policy: Policy, *, seed: int, epoch: Integers, sample_ids: Integers, sizes: Integers, use: Integers
) -> Draws:
    """Draws (n, 2) of the c-th use of each sample: views 2c and 2c + 1."""
    draws = draw(policy, seed=seed, epoch=epoch, sample_ids=sample_ids, sizes=sizes)
    again = np.flatnonzero(use)  # few: drawing as many views of all as the worst needs would cost a second a batch
    if len(again):
        drawn = draw(
            policy, seed=seed, epoch=epoch[again], sample_ids=sample_ids[again], sizes=sizes[again],
            views=2 * int(use.max()) + 2,
        )  # fmt: skip
        theirs = drawn[np.arange(len(again))[:, None], 2 * use[again, None] + np.arange(2)]
        for field in fields(Draws):
            getattr(draws, field.name)[again] = getattr(theirs, field.name)
    return draws


def _decoded(chosen: Integers, rows: Rows, limits: Limits) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Groups of images that decode, and their indices in `chosen`; valid until the next group."""
    memory = np.empty(_BYTES_AT_ONCE, dtype=np.uint8)
    group: list[int] = []
    images: list[Pixels] = []
    used = 0
    for index, row in enumerate(chosen.tolist()):
        data, header = rows.encoded[row], rows.headers[row]
        assert data is not None
        assert not isinstance(header, Rejected)
        needed = 3 * header.height * header.width
        if images and used + needed > len(memory):
            yield group, images
            group, images, used = [], [], 0
        image = decode_reduced(data, header, limits, buffer=memory[used:])
        if isinstance(image, Rejected):
            rows.reasons[row] = _code(image)
            continue
        group.append(index)
        images.append(image.pixels)
        used = min(used + needed, len(memory))
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


def _code(image: object) -> int:
    return REASONS.index(image.reason) if isinstance(image, Rejected) else ACCEPTED
