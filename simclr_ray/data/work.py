"""The folder in which an index or a pack is made: taken for the work at first, left with nothing but the result.

While the work is not finished its settings lie beside it, so that the same command goes on and another one is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simclr_ray import storage
from simclr_ray.data.manifest import MANIFEST_NAME
from simclr_ray.data.shards import refuse_non_empty
from simclr_ray.errors import ConfigError

REJECTED_NAME = "rejected.parquet"
REPORT_NAME = "index_report.json"
SETTINGS_NAME = "_settings.json"
"""What a folder is being made from; there while the work is not finished."""
SOURCE_STATE = "source_state"
"""Setting under which `sources.state_of` is noted: lists and data sets are read anew when work goes on."""
LISTING, OPENED = "_listing", "_opened"
INDEX, HASHES, PARTS = "_index", "_hashes", "_parts"
"""Folders of a pack that is not finished: its index, hashes for finding duplicates, notes of the shards written."""


@dataclass(frozen=True)
class Claim:
    """A folder taken for some work."""

    folder: str
    begun: bool
    """Whether the same work was begun there before."""
    existed: bool
    """Whether the folder was there, though empty."""

    def withdraw(self) -> None:
        """Leave the folder as it was found, when nothing could be done."""
        if not self.begun:
            finish(self.folder)
            if not self.existed:
                storage.delete_folder(self.folder)


def claim(folder: str, settings: Mapping[str, Any]) -> Claim:
    """Take a folder for some work, or go on with the same work there.

    With other settings, or of a source that changed, the work starts again from the listing, as long as no shard was
    written.

    Raises:
        ConfigError: the folder holds something else, or shards of other settings or of what the source was before.
    """
    uri = storage.join(folder, SETTINGS_NAME)
    try:
        begun = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        existed = storage.exists(folder)
        refuse_non_empty(folder)
        storage.write_bytes(uri, json.dumps(settings, indent=1).encode())
        return Claim(folder, begun=False, existed=existed)
    wanted = json.loads(json.dumps(settings))
    for name in dict.fromkeys([*wanted, *begun]):
        if wanted.get(name) != begun.get(name):
            if storage.exists(storage.join(folder, PARTS)) or storage.exists(storage.join(folder, MANIFEST_NAME)):
                raise _other_work(folder, name, got=wanted.get(name), begun=begun.get(name))
            _start_over(folder, keep_listing=wanted.get("source") == begun.get("source"))
            storage.write_bytes(uri, json.dumps(settings, indent=1).encode())
            break
    return Claim(folder, begun=True, existed=True)


def _other_work(folder: str, name: str, *, got: object, begun: object) -> ConfigError:
    """The error for work that cannot go on because the setting `name` is another one."""
    what, fix = f"the folder holds work with another {name}", "use the same settings to go on, or delete the folder"
    if name == SOURCE_STATE:
        what = "the source changed since the work in this folder was begun, and old and new rows would be mixed"
        fix = "put the source back as it was to go on, or delete the folder to begin again"
    return ConfigError(what, where=folder, got=got, expected=f"{begun}", fix=fix)


def _start_over(folder: str, *, keep_listing: bool) -> None:
    """Remove what work of other settings left; nothing of it was an image."""
    for name in storage.list_names(folder):
        place = storage.join(folder, name)
        if name == INDEX:
            _start_over(place, keep_listing=keep_listing)
        elif name in (OPENED, HASHES) or (name == LISTING and not keep_listing):
            storage.delete_folder(place)
        elif name in (MANIFEST_NAME, REPORT_NAME, REJECTED_NAME) or name.startswith("list-"):
            storage.delete_file(place)


def finish(folder: str) -> None:
    """Remove what only unfinished work needs, its settings last."""
    for name in (LISTING, OPENED, INDEX, HASHES, PARTS):
        storage.delete_folder(storage.join(folder, name))
    storage.delete_file(storage.join(folder, SETTINGS_NAME))
