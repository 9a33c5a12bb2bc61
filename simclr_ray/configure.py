"""From a YAML file and overrides to one validated `Config`, or to every error at once.

The order is file, then overrides, then one validation; the command line, the Python functions and searches all
come through `load_config`. Errors name the key's full path, show what was got, and suggest the nearest key for a
typo. Nothing here starts Ray or reads data.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from simclr_ray import storage
from simclr_ray.config import Config, StorageConfig
from simclr_ray.errors import ConfigError
from simclr_ray.storage.redaction import is_credential_name

MAX_CONFIG_BYTES = 1_000_000
#: What other projects call our keys, for people who come from them.
FOREIGN_NAMES = {
    "batch_size": "train.global_batch",
    "lr": "optim.base_learning_rate",
    "learning_rate": "optim.base_learning_rate",
    "tau": "loss.temperature",
    "max_epochs": "train.epochs",
    "backbone": "model.encoder",
    "num_workers": "cluster.workers",
}

_NO_CREDENTIALS = (
    "a configuration holds no credentials; give the machines a role, or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or a profile, where Ray's nodes start"
)

ConfigSource = Config | Mapping[str, Any] | str | Path | None


def load_config(source: ConfigSource = None, overrides: Sequence[str] = ()) -> Config:
    """Build a config from a file, a mapping, a ready `Config` or nothing, with `a.b=c` overrides on top.

    Raises:
        ConfigError: listing every mistake, one a line, with the key's full path.
    """
    values = _read(source)
    problems = [problem for override in overrides if (problem := _apply_override(values, override))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [describe(one, all_keys()) for one in error.errors(include_url=False)]
    problems += cross_checks(values)
    if problems:
        raise listing(problems, "the configuration")
    return config


def use_storage(config: Config) -> None:
    """Let this process, and what it starts, reach object stores as the config says; one that says nothing changes none.

    Every verb does this before it opens anything. It stays in force, so that `load_encoder` finds a run in the same
    store afterwards.
    """
    if config.storage != StorageConfig():
        storage.configure(config.storage.settings())


def require_places(config: Config, *names: str) -> None:
    """Refuse a config that does not say where the run and its images are.

    Args:
        config: Of a run.
        names: What is needed; `run.folder` and `data.train` by default.

    Raises:
        ConfigError: one is missing.
    """
    given = {"run.folder": config.run.folder, "data.train": config.data.train}
    missing = [name for name in names or given if not given[name]]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set", fix=f"add --set {missing[0]}=FOLDER")


def cross_checks(values: Mapping[str, Any]) -> list[str]:
    """Mistakes that no section can see alone; empty when there are none.

    Takes the values as given, so that these are reported together with mistakes that leave no valid `Config`.
    """
    train = values.get("train")
    if isinstance(train, Mapping) and train.get("epochs") is not None and train.get("steps") is not None:
        return ["train.epochs, train.steps: both are set; give one of them"]
    return []


def schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors and for other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML in its own key order."""
    return yaml.safe_dump(dict(values), sort_keys=False, width=120)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration as its full path, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_keys(field.annotation, f"{prefix}{name}.")


def _read(source: ConfigSource) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.model_dump(mode="json")
    return read_mapping(source)


def read_mapping(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Sections of a YAML file, or a copy of a mapping.

    Raises:
        ConfigError: there is no such file, it is too large, or it holds something else.
    """
    if isinstance(source, Mapping):
        return cast(dict[str, Any], json.loads(json.dumps(source, default=os.fspath)))
    path = Path(source)
    if not path.is_file():
        raise ConfigError("configuration file not found", where=str(path), fix="give the path of a YAML file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(
            "configuration file is too large",
            where=str(path),
            got=f"{path.stat().st_size} bytes",
            expected=f"at most {MAX_CONFIG_BYTES}",
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "the file must hold sections", where=str(path), got=type(values).__name__, expected="a mapping"
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=c` in place, or say what is wrong with it.

    The value is read as YAML, so `null`, `[0, 1]` and `true` mean what they say.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        return f"override {override!r}: not of the form section.key=value"
    *sections, key = path.strip().split(".")
    target = values
    for section in sections:
        nested = target.get(section)
        target[section] = dict(nested) if isinstance(nested, Mapping) else {}
        target = target[section]
    try:
        target[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        target[key] = text
    return None


def describe(error: Mapping[str, Any], keys: Iterable[str]) -> str:
    """One of pydantic's errors as a line: the key's full path, what was got, what was expected; `keys` are all."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if is_credential_name(path.rpartition(".")[2]):
            return f"{path} is no key: {_NO_CREDENTIALS}"
        return f"{path}: unknown key{suggestion(path, keys)}"
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):  # of a section, whose values may be many
        return f"{path + ': ' if path else ''}{str(error['msg']).removeprefix('Value error, ')}"
    message = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{path}: got {error['input']!r}, expected {message}"


def suggestion(path: str, keys: Iterable[str] | None = None) -> str:
    """Nearest of the known keys: the same leaf in another section first, else the closest spelling."""
    keys = list(all_keys() if keys is None else keys)
    leaf = path.rpartition(".")[2]
    moved = [key for key in keys if key.rpartition(".")[2] == leaf]
    foreign = [FOREIGN_NAMES[leaf]] if FOREIGN_NAMES.get(leaf) in keys else []
    near = moved or foreign or difflib.get_close_matches(path, keys, n=1, cutoff=0.6)
    if not near:
        leaves = {key.rpartition(".")[2]: key for key in keys}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return f" (did you mean {near[0]}?)" if near else ""


def listing(problems: Sequence[str], where: str) -> ConfigError:
    """All mistakes as one error."""
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    lines = "\n".join(f"  {storage.redact(line)}" for line in problems)  # they quote values, which may hold a key
    return ConfigError(f"{count} in {where}:\n{lines}")
