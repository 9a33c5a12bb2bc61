"""Errors that are sentences for their reader: what failed, where, got, expected, what to do.

Each family has an exit code that scripts and schedulers can act on (table in the README). Anything that is not
a `SimclrError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SimclrError(Exception):
    """Base of everything a user can cause and mend. `str(error)` is the whole message."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Compose the message; parts left at None are left out."""
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.got is not None:
            head += f" (got {self.got})"
        if self.expected:
            head += f"; expected {self.expected}"
        return head + (f"\n  {self.fix}" if self.fix else "")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by parts: Ray carries errors between processes, and Exception's default would lose the keywords."""
        return (_rebuild, (type(self), self.what, self.where, _text(self.got), self.expected, self.fix))


class ConfigError(SimclrError, ValueError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2


class HeldError(ConfigError):
    """Another driver holds the run folder, or did so a moment ago: it may be had later."""


class DataError(SimclrError):
    """Images, shards or a manifest that cannot be used."""

    exit_code = 3


class StorageError(SimclrError):
    """A place that cannot be read or written, or a checkpoint that cannot be trusted."""

    exit_code = 4


class ClusterError(SimclrError):
    """Ray, its resources or its workers."""

    exit_code = 5


class NumericsError(SimclrError):
    """A loss or gradient that is not finite."""

    exit_code = 6


def root_cause(error: BaseException | None) -> SimclrError | None:
    """Find our own error inside those that Ray wrapped around it."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        one = queue.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, SimclrError):
            return one
        # Ray's task error keeps the cause in `cause`, Train's in `worker_failures` and `_base_exc`.
        parts = vars(one)
        queue += [one.__cause__, one.__context__, parts.get("cause"), parts.get("_base_exc")]
        queue += [parts.get("controller_failure"), *dict(parts.get("worker_failures") or {}).values()]
    return None


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _text(value: object) -> object:
    """Keep what pickles anywhere; turn the rest into its text."""
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _rebuild(
    cls: type[SimclrError], what: str, where: str | None, got: object, expected: str | None, fix: str | None
) -> SimclrError:
    return cls(what, where=where, got=got, expected=expected, fix=fix)
