"""Which labels a protocol may use: balanced parts of a set, or a published list of files.

SimCLR's 1 % and 10 % of ImageNet are the lists that google-research/simclr publishes (`imagenet_subsets/1percent.txt`
and `10percent.txt`, 12,811 and 128,116 names): numbers are comparable with others' on these alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simclr_ray import storage
from simclr_ray.errors import DataError
from simclr_ray.evaluate.linear import balanced_subset


def part_of_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """Rows of a class-balanced part, one label a class at least; all rows for 1.

    Args:
        labels: (n,) int64.
        fraction: In (0, 1].
        num_classes: Classes of the task.
        seed: Draws the rows.

    Raises:
        DataError: a class has too few labels.
    """
    if fraction == 1:
        return torch.arange(len(labels))
    return balanced_subset(labels, max(num_classes, round(fraction * len(labels))), num_classes, seed)


def read_file_list(uri: str) -> list[str]:
    """The file names of a list, a line each; empty lines are passed over.

    Raises:
        DataError: it is missing, empty, no text, or names a file twice.
    """
    try:
        names = [line.strip() for line in storage.read_bytes(storage.normalise(uri)).decode().splitlines()]
    except FileNotFoundError:
        raise DataError("no list of files here", where=uri) from None
    except UnicodeDecodeError:
        raise DataError("the list of files is no text", where=uri) from None
    names = [name for name in names if name]
    if not names or len(set(names)) != len(names):
        raise DataError("the list of files is empty or names one twice", where=uri, got=f"{len(names)} lines")
    return names


def rows_of_list(names: Sequence[str], uris: Sequence[str], where: str) -> Tensor:
    """Rows whose file has one of the names, in the order of the rows; folders before the file name do not count.

    Args:
        names: Of the list.
        uris: Of the rows, as the data set keeps them.
        where: The list, for messages.

    Raises:
        DataError: a file is not in the data set, or several rows have its name.
    """
    wanted = {_base(name) for name in names}
    bases = [_base(uri) for uri in uris]
    rows = [row for row, base in enumerate(bases) if base in wanted]
    found = {bases[row] for row in rows}
    missing = sorted(wanted - found)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} files of the list are not in the data set", where=where,
            got=ascii(missing[0]), fix="give the data set that the list was published for, packed with its file names",
        )  # fmt: skip
    if len(rows) != len(found):
        raise DataError("several images of the data set have the same file name", where=where)
    return torch.tensor(rows)


def _base(name: str) -> str:
    return name.rpartition("#")[2].rpartition("/")[2]
