"""One plugin: what it is, where it comes from, and whether it can be used."""

from __future__ import annotations

import inspect
import sys
import traceback
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from invarlock.core.errors import EscapedError, InvarlockError, PluginError, UsageError
from invarlock.plugins.classes import Guard, ModelAdapter

OWN_DISTRIBUTION = "invarlock"


class Kind(StrEnum):
    ADAPTER = "adapter"
    GUARD = "guard"
    EDIT = "edit"
    HOOKS = "hooks"
    """Neither loads nor judges: wrappers, readers of the report, and modules that bring any of the following."""
    PROVIDER = "provider"
    EXPORTER = "exporter"
    REPORT_FORMAT = "report format"
    COMMAND = "command"
    TASK = "task"


class Origin(StrEnum):
    BUILTIN = "builtin"
    PLUGIN = "plugin"
    LOCAL = "local"
    """Named with ``-p`` or ``plugins:``, not installed."""


class Status(StrEnum):
    READY = "ready"
    MISSING = "missing"
    """It needs a distribution that is not installed."""
    ERROR = "error"
    """It does not import, cannot be constructed, or its hooks are wrong."""
    BLOCKED = "blocked"
    """Turned off with ``-p no:NAME``; it was not imported."""


GROUPS = {Kind.GUARD: "invarlock.guards", Kind.ADAPTER: "invarlock.adapters", Kind.HOOKS: "invarlock.hooks"}
KINDS = {group: kind for kind, group in GROUPS.items()}
BASES: dict[Kind, type] = {Kind.GUARD: Guard, Kind.ADAPTER: ModelAdapter}


@dataclass
class Plugin:
    """One plugin, ready or not, and why not."""

    name: str
    kind: Kind
    origin: Origin
    module: str
    attribute: str = ""
    distribution: str | None = None
    version: str | None = None
    status: Status = Status.READY
    error: str | None = None
    trace: str | None = None
    ended_process: bool = False
    """Its code raised ``SystemExit`` or the like."""
    factory: Any = None
    """A class of the class form, or a module or object with hook implementations."""
    instance: Any = None
    """The object registered for hook calls: made from a class without options, or the module or object itself."""
    entry_point: str | None = None
    """Group, name and value, of an installed plugin."""
    requires: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def file(self) -> str | None:
        """Its source file, for the place of a failure."""
        return getattr(sys.modules.get(self.module), "__file__", None)

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.factory)

    @property
    def is_own_hooks(self) -> bool:
        """True for hooks that are built in: ``-p report`` or ``-p demo`` means a module of somebody's own."""
        return self.origin is Origin.BUILTIN and self.kind is Kind.HOOKS

    @property
    def whose(self) -> str:
        if self.origin is Origin.LOCAL:
            return f"by one of -p {self.module}"
        return "by a built-in" if self.origin is Origin.BUILTIN else f"by one of {self.distribution} {self.version}"

    @property
    def options_missing(self) -> bool:
        """True if a class lacks nothing but options, which only a configuration can give."""
        derived = self.is_class and issubclass(self.factory, Guard | ModelAdapter)
        return derived and self.instance is None and self.status is Status.ERROR

    def fail(self, error: str, status: Status = Status.ERROR) -> None:
        self.status, self.error = status, error

    def fail_of(self, error: Exception, message: str) -> None:
        """Fail of what its code raised, in an ``except`` block."""
        self.fail(message)
        self.trace, self.ended_process = traceback.format_exc(), isinstance(error, EscapedError)

    def require_ready(self) -> None:
        """Make sure that a plugin can be used which somebody asked for by name.

        :raises UsageError: it cannot.
        :raises PluginError: because it would have ended the process.
        """
        if self.status is not Status.READY:
            failure: type[InvarlockError] = PluginError if self.ended_process else UsageError
            raise failure(f"{self.label} is {_WHY[self.status]}: {self.error}")


_WHY = {Status.MISSING: "not usable here", Status.ERROR: "broken", Status.BLOCKED: "blocked"}
