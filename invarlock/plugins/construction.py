"""Guards made with the options that a configuration gives them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from invarlock.core.errors import PluginError, UsageError, contained, located, nearest, one_line
from invarlock.plugins.plugin import Plugin


def construct(plugin: Plugin, options: Mapping[str, Any]) -> Any:
    """A guard with its options; of a module or object the options are its policy alone.

    :raises UsageError: an option that the guard does not take, or of another type than its constructor states.
    """
    # A class with required options is listed as broken, since it cannot be constructed without them; here it may be.
    if not plugin.options_missing:
        plugin.require_ready()
    if not plugin.is_class:
        return plugin.instance
    _check_names(plugin, options)
    _check_types(plugin, options)
    try:
        with contained():
            return plugin.factory(**copy.deepcopy(dict(options)))
    except UsageError as error:
        raise UsageError(f"guards.{plugin.name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"guards.{plugin.name}: cannot be constructed: {one_line(error)}") from error
    except Exception as error:
        raise PluginError(f"guard {plugin.name}: cannot be constructed: {located(error, plugin.file)}") from error


def _check_names(plugin: Plugin, options: Mapping[str, Any]) -> None:
    accepted = inspect.signature(plugin.factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for name in options:
        if name not in accepted and not takes_any:
            known = f"; it takes {', '.join(accepted)}" if accepted else "; it takes no options"
            raise UsageError(
                f"guards.{plugin.name}.{name}: the guard has no such option{nearest(name, accepted)}{known}"
            )


def _check_types(plugin: Plugin, options: Mapping[str, Any]) -> None:
    """Hold options against the annotations of the constructor, where it has any that can be read."""
    # Only here: most configurations give no guard any options, and pydantic is slow to import.
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(plugin.factory.__init__)
    except (NameError, TypeError, AttributeError):
        # Names that exist for a type checker alone.
        return
    for name in options.keys() & hints.keys():
        try:
            TypeAdapter(hints[name]).validate_python(options[name], strict=True)
        except ValidationError as error:
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            raise UsageError(
                f"guards.{plugin.name}.{name}: {options[name]!r} is no {wanted}: {error.errors()[0]['msg']}"
            ) from None
        except PydanticUserError:
            # A class of the author's own, which pydantic knows nothing of.
            continue
