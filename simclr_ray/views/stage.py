"""The CPU stage of the stream: the encoded images of one unit become two views each, R rows in and R rows out.

A row that does not decode is never dropped, for a dropped row would shift every later batch. It is replaced by the
next row of its unit that does (in planned order, around the end), in views of its own: the c-th use of a sample in
its unit takes views 2c and 2c + 1. The rule knows the unit alone, so it is the same at every world size; the
rejected row is reported beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from simclr_ray.data.decode import REASONS, Limits, Rejected, decode
from simclr_ray.errors import DataError
from simclr_ray.views.apply import two_views
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import Policy

Columns = dict[str, npt.NDArray[np.generic]]
Integers = npt.NDArray[np.int64]

ACCEPTED = -1


@dataclass(frozen=True)
class ViewStage:
    """Decode, draw and apply, for Ray Data's `map_batches` over whole units."""

    policy: Policy
    seed: int
    limits: Limits

    def __call__(self, unit: Columns) -> Columns:
        """Turn the columns `image`, `sample_id`, `unit` and `epoch` into views.

        Returns:
            `views` (R, 2, S, S, 3) uint8; `sample_id` (R,) of the image that was used; `unit` as it came;
            `rejected_id` (R,) and `reason` (R,) of the image that stood here before, -1 where it was used.

        Raises:
            DataError: no row of the unit decodes.
        """
        torch.set_num_threads(1)  # Ray runs one such task a CPU; more threads would only compete
        decoded = [decode(data, self.limits) for data in unit["image"].tolist()]
        reasons = np.array([_code(image) for image in decoded], dtype=np.int8)
        accepted = reasons == ACCEPTED
        if not accepted.any():
            names = ", ".join(sorted({REASONS[code] for code in reasons}))
            raise DataError(
                f"none of the {len(decoded)} images of unit {unit['unit'][0]} can be decoded",
                got=names,
                fix="look at the images with sample ids from " + str(unit["sample_id"].min()),
            )
        source, use = replacements(accepted)
        images = [image for image in (decoded[i] for i in source) if not isinstance(image, Rejected)]
        ids = unit["sample_id"].astype(np.int64)
        draws = draw(
            self.policy,
            seed=self.seed,
            epoch=unit["epoch"][source].astype(np.int64),
            sample_ids=ids[source],
            sizes=np.array([image.shape[:2] for image in images]),
            views=2 * int(use.max()) + 2,
        )
        mine = draws[np.arange(len(use))[:, None], 2 * use[:, None] + np.arange(2)]
        return {
            "views": two_views(images, mine, self.policy),
            "sample_id": ids[source],
            "unit": unit["unit"],
            "rejected_id": np.where(reasons == ACCEPTED, -1, ids),
            "reason": reasons,
        }


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


def _code(image: object) -> int:
    return REASONS.index(image.reason) if isinstance(image, Rejected) else ACCEPTED
