"""Models that do not read samples as the other models of their task do: found by trying, before a pass."""

from __future__ import annotations

from typing import Any

from invarlock.api import InputError

CANNOT_READ = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Exceptions of a model that takes its inputs otherwise."""


def refusal(model: Any, task: str, error: Exception) -> InputError:
    """The reason why a model cannot be measured, from the exception that it raised."""
    from invarlock.api import one_line

    return InputError(
        f"{type(model).__name__} takes its inputs otherwise than the {task} models that can be measured "
        f"({one_line(error)}); a plugin can add a task for it by the hook invarlock_tasks"
    )
