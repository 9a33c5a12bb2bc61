"""The run folder: the only interface between verbs, and the place where a run is recognised.

```
config.yaml     as given              checkpoints/step-NNNNNNNNN/
resolved.yaml   with derived numbers  quarantine.parquet   rejected images
run.json        identity and status   eval/                what `evaluate` measured
metrics.jsonl   the truth             tensorboard/  ray/   for those tools
```

Rerunning a command with the same folder continues the run, so a folder made by another configuration must be told
apart: whatever decides the loss curve is the run's identity, and a difference is refused field by field.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import flat, load_config, to_yaml
from simclr_ray.data import quarantine
from simclr_ray.errors import ConfigError
from simclr_ray.train.derive import Derived
from simclr_ray.train.lock import LOCK_NAME
from simclr_ray.version import __version__

FORMAT = 1
PROBE = ".probe-"
"""Begin of the names with which `check` tries whether a folder can be written."""
#: Settings that may change between attempts: they decide speed, logging or evaluation, and the loss curve only by
#: rounding (`loss.`, `train.channels_last`, `train.compile` and workers by the order of sums, `views.where` by a level
#: of 255 here and there in views).
#: The data set's place is one of them, for its fingerprint says what it holds.
FREE = (
    "run.folder",
    "data.train",
    "data.max_rejected_fraction",
    "data.rejected_window",
    "data.units_per_task",
    "data.units_per_segment",
    "data.steps_ahead",
    "data.prefetch_units",
    "views.where",
    "loss.exchange",
    "loss.kernel",
    "train.channels_last",
    "train.compile",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_every_s",
    "train.max_failed_saves",
    "train.on_nonfinite",
    "train.max_rollbacks",
    "train.stop_on_collapse",
    "train.keep_checkpoints",
    "cluster.",
    "storage.",
    "evaluate.",
)

#: Settings that name a folder.
PLACES = (("run", "folder"), ("data", "train"), ("evaluate", "train"), ("evaluate", "test"), ("distill", "teacher"))

#: What earlier versions did before there was a setting for it, where that is not its default now.
BEFORE = {"views.scaled_decode": False}
#: Settings that earlier versions had, with the value that did nothing: runs that kept it are read and go on.
GONE: dict[str, Any] = {"distill.label_fraction": 0.0}


_UPDATING = threading.Lock()


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    uri: str

    def path(self, *parts: str) -> str:
        """URI of something inside."""
        return storage.join(self.uri, *parts)

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return self.path("checkpoints")

    @property
    def metrics(self) -> str:
        """The metrics file."""
        return self.path("metrics.jsonl")

    def info(self) -> dict[str, Any] | None:
        """`run.json`; None where no run has been started."""
        try:
            return dict(json.loads(storage.read_bytes(self.path("run.json"))))
        except FileNotFoundError:
            return None

    def update(self, **changes: Any) -> None:
        """Change fields of `run.json`."""
        with _UPDATING:  # the driver and its scribe, a thread, change fields of their own
            info = (self.info() or {}) | changes
            storage.write_bytes(self.path("run.json"), json.dumps(info, indent=1).encode())


def identity(config: Config, manifest_fingerprint: str) -> dict[str, Any]:
    """Everything that decides the loss curve, flat."""
    values = flat(config.model_dump(mode="json"))
    if config.distill.digest is not None:  # which says what the teacher is, wherever it lies
        values |= {"distill.teacher": None, "distill.classifier": None}
    return {key: value for key, value in values.items() if not key.startswith(FREE)} | {
        "manifest": manifest_fingerprint
    }


def config_of(resolved: Mapping[str, Any]) -> Config:
    """The settings of a `resolved.yaml`, also where an earlier version wrote it.

    Raises:
        ConfigError: it has a setting that there is not, or a value that cannot be.
    """
    values = {key: value for key, value in resolved.items() if key != "derived"}
    for name, idle in GONE.items():
        section, _, key = name.partition(".")
        inside = values.get(section)
        if isinstance(inside, Mapping) and key in inside and inside[key] == idle:
            values[section] = {one: value for one, value in inside.items() if one != key}
    return load_config(values)


def absolute(config: Config) -> Config:
    """With absolute places, which mean the same in other processes and to later verbs, whose folder may be another."""
    values = config.model_dump(mode="json", exclude_unset=True)
    for section, name in PLACES:
        if values.get(section, {}).get(name):
            values[section][name] = storage.normalise(values[section][name])
    return load_config(values)


#: Everything that a run writes into its folder; `start_afresh` removes this and nothing else.
CONTENTS = (
    "checkpoints/", "eval/", "ray/", "tensorboard/", "config.yaml", "metrics.jsonl", "quarantine.parquet",
    "resolved.yaml", "run.json",
)  # fmt: skip


def look_at_run(folder: str) -> RunFolder:
    """Refuse a folder that holds something else, before anything is written.

    Raises:
        ConfigError: the folder is a file, or not empty and no run's.
    """
    run = RunFolder(storage.normalise(folder))
    if storage.is_local(run.uri) and Path(run.uri).is_file():
        raise ConfigError("the run folder is a file", where=run.uri, fix="choose a folder with run.folder")
    if storage.is_local(run.uri) and Path(run.uri).is_dir() and not os.access(run.uri, os.W_OK):
        raise ConfigError("the run folder cannot be written", where=run.uri, fix="choose another with run.folder")
    if run.info() is None:
        names = [name for name in storage.list_names(run.uri) if name != LOCK_NAME and not name.startswith(PROBE)]
        if names:
            raise ConfigError(
                "the folder is not empty and holds no run", where=run.uri, got=", ".join(names[:3]),
                fix="choose an empty folder with run.folder",
            )  # fmt: skip
    return run


def start_afresh(run: RunFolder) -> None:
    """Remove what an earlier run wrote; `run.json` last, so that a kill leaves a folder that is still recognised."""
    for name in sorted(CONTENTS, key=lambda name: name == "run.json"):
        if name.endswith("/"):
            storage.delete_folder(run.path(name.rstrip("/")))
        else:
            storage.delete_file(run.path(name))


def open_run(
    config: Config, derived: Derived, manifest_fingerprint: str, *, say: Callable[[str], None] = lambda line: None
) -> tuple[RunFolder, bool]:
    """Make the run folder, or recognise it.

    Args:
        config: Of the run.
        derived: Its numbers.
        manifest_fingerprint: Of the data set.
        say: Told of each setting that differs from the last start and may.

    Returns:
        The folder, and whether the run existed already.

    Raises:
        ConfigError: the folder holds something else, or a run that another configuration made.
    """
    assert config.run.folder is not None
    run = look_at_run(config.run.folder)
    info = run.info()
    mine = identity(config, manifest_fingerprint)
    if info is None:
        # First the identity: a kill between any two of these writes leaves a folder that the next start recognises.
        run.update(format=FORMAT, version=__version__, created=_now(), status="new", attempts=0, identity=mine)
        _write_settings(run, config, derived)
        return run, False
    if info.get("format", 0) > FORMAT:
        raise ConfigError("this run was made by a newer version", where=run.uri, got=f"format {info['format']}")
    refuse_another(run, info["identity"], mine)
    for line in _accepted(run, config):
        say(line)
    _write_settings(run, config, derived)
    return run, True


def note_views(run: RunFolder, *, maker: str, where: str, say: Callable[[str], None]) -> None:
    """Keep in `run.json` who makes the views, as the driver's machine sees it, and say if it was another before.

    Args:
        run: Of this start.
        maker: `kernel`, `opencv` or `torch`.
        where: Whether the stream finishes views (`cpu`) or crops them (`gpu`).
        say: Told of a difference.
    """
    now = {"maker": maker, "where": where}
    before = (run.info() or {}).get("views", now)
    if before != now:
        say(
            f"views are made otherwise than at the last start: {_made(before)} then, {_made(now)} now; a few values "
            "in a thousand differ by a level of 255, so losses are nearly those of an undisturbed run, but not its bits"
        )
    run.update(views=now)


def _made(views: Mapping[str, str]) -> str:
    return f"by {views['maker']} with views.where={views['where']}"


def refuse_another(run: RunFolder, existing: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a folder whose run has another identity.

    Raises:
        ConfigError: field by field.
    """
    differences = compare(existing, mine)
    if differences:
        raise ConfigError(
            "this folder holds a run with another configuration:\n" + "\n".join(f"  {line}" for line in differences),
            where=run.uri,
            fix="choose another run.folder, set these back to continue the run, or start again with pretrain --fresh",
        )


def compare(existing: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Differences between two identities, a line each."""
    # A setting that the run's version did not have yet.
    defaults = flat(Config().model_dump(mode="json")) | BEFORE
    keys = sorted(set(existing) | set(mine))
    existing = {key: existing.get(key, defaults.get(key)) for key in keys}
    keys = [key for key in keys if key not in GONE or existing[key] != GONE[key]]
    return [
        f"{key}: the run has {existing.get(key)!r}, now {mine.get(key)!r}"
        for key in keys
        if existing.get(key) != mine.get(key)
    ]


def _accepted(run: RunFolder, config: Config) -> list[str]:
    """Settings that differ from the last start, a line each; all of them may."""
    try:
        before = yaml.safe_load(storage.read_bytes(run.path("resolved.yaml")))
    except FileNotFoundError:
        return []
    before = flat({key: value for key, value in before.items() if key != "derived"})
    now = flat(config.model_dump(mode="json"))
    return [
        f"changed since the last start, and free to: {key} {before[key]!r} -> {now[key]!r}"
        for key in sorted(now)
        if key in before and key.startswith(FREE) and _place(before[key]) != _place(now[key])
    ]


def _place(value: Any) -> Any:
    """Paths are stored absolute."""
    return storage.normalise(value) if isinstance(value, str) and "/" in value else value


def open_existing(folder: str) -> tuple[RunFolder, Config]:
    """Open a run that was trained, for the verbs that come after.

    Raises:
        ConfigError: no run here.
    """
    run = RunFolder(storage.normalise(folder))
    if run.info() is None:
        raise ConfigError("no run here: run.json is missing", where=run.uri, fix="give the run.folder of a pretraining")
    resolved = yaml.safe_load(storage.read_bytes(run.path("resolved.yaml")))
    return run, config_of(resolved)


def write_quarantine(run: RunFolder, entries: pa.Table) -> None:
    """Write the list of rejected images."""
    buffer = io.BytesIO()
    pq.write_table(entries, buffer, compression="zstd")
    storage.write_bytes(run.path("quarantine.parquet"), buffer.getvalue())


def read_quarantine(run: RunFolder) -> pa.Table | None:
    """The list of rejected images (`data.quarantine.SCHEMA`); None where none was met."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(run.path("quarantine.parquet")))).cast(quarantine.SCHEMA)
    except FileNotFoundError:
        return None


def _write_settings(run: RunFolder, config: Config, derived: Derived) -> None:
    given = config.model_dump(mode="json", exclude_unset=True)
    storage.write_bytes(run.path("config.yaml"), to_yaml(given).encode())
    values = absolute(config).model_dump(mode="json") | {"derived": derived.as_dict()}
    storage.write_bytes(run.path("resolved.yaml"), to_yaml(values).encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
