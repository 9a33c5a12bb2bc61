"""The folder of a search: where it is recognised, so that the same command continues it and another is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import flat
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.search.space import FREE_FIELDS, SearchSpec
from simclr_ray.train.lock import LOCK_NAME
from simclr_ray.train.run import compare, identity

FORMAT = 1
SEARCH = "search.json"


@dataclass(frozen=True)
class SearchFolder:
    """Paths of a search, and its status."""

    uri: str

    def path(self, *parts: str) -> str:
        """URI of something inside."""
        return storage.join(self.uri, *parts)

    def info(self) -> dict[str, Any] | None:
        """`search.json`; None where no search was begun."""
        try:
            return dict(json.loads(storage.read_bytes(self.path(SEARCH))))
        except FileNotFoundError:
            return None

    def update(self, **changes: Any) -> None:
        """Change fields of `search.json`."""
        info = (self.info() or {}) | changes
        storage.write_bytes(self.path(SEARCH), json.dumps(info, indent=1).encode())


@dataclass(frozen=True)
class Identity:
    """Everything that decides what a search finds, flat."""

    config: dict[str, Any]
    space: dict[str, Any]

    @classmethod
    def of(cls, config: Config, manifest: Manifest, spec: SearchSpec, measured: Manifest) -> Identity:
        """Of a configuration, a space and the data set of the objective; places of data sets as absolute paths."""
        evaluate = flat({"evaluate": config.evaluate.model_dump(mode="json")})
        for key in ("evaluate.train", "evaluate.test"):
            evaluate[key] = evaluate[key] and storage.normalise(evaluate[key])
        values = spec.model_dump(mode="json")
        space: dict[str, Any] = {
            f"space.{key}": json.dumps({kind: given for kind, given in one.items() if given is not None})
            for key, one in values.pop("space").items()
        }
        space |= {key: value for key, value in flat(values).items() if key not in FREE_FIELDS}
        space["objective.data"] = spec.objective.data and storage.normalise(spec.objective.data)
        space["objective.data's images"] = measured.fingerprint
        return cls(identity(config, manifest.fingerprint) | evaluate, space)


def look(folder: SearchFolder, mine: Identity) -> None:
    """Refuse a folder that holds something else, or another search.

    Raises:
        ConfigError: with every field that differs.
    """
    info = folder.info()
    if info is None:
        names = [name for name in storage.list_names(folder.uri) if name != LOCK_NAME]
        if names:
            raise ConfigError(
                "the folder is not empty and holds no search", where=folder.uri, got=", ".join(names[:3]),
                fix="choose an empty folder with --folder",
            )  # fmt: skip
        return
    if info.get("format", 0) > FORMAT:
        raise ConfigError("this search was made by a newer version", where=folder.uri, got=f"format {info['format']}")
    lines = compare(info["config"], mine.config)
    lines += [f"space file: {line}" for line in compare(info["space"], mine.space)]
    if lines:
        raise ConfigError(
            "this folder holds a search with other settings:\n" + "\n".join(f"  {line}" for line in lines),
            where=folder.uri, fix="choose another --folder, or set these back to continue the search",
        )  # fmt: skip
