"""Checks of an imported plugin: its requirements, its constructor, and the form of its hooks."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Iterable
from typing import Any

from invarlock import hookspecs
from invarlock.core.errors import contained, located, nearest, one_line
from invarlock.plugins.plugin import BASES, Plugin, Status


def hook_marks(function: Any) -> dict[str, Any]:
    """Marks that ``@hookimpl`` left on a function; none where it is not marked."""
    marks = getattr(function, "invarlock_impl", None)
    return marks if isinstance(marks, dict) else {}


def is_wrapper(function: Any) -> bool:
    """True if a hook implementation goes around the others."""
    return bool(hook_marks(function).get("wrapper"))


HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("invarlock_"))


def check(plugin: Plugin) -> None:
    """Find out whether an imported plugin can be used, and make the instance that hook calls reach."""
    try:
        with contained():
            plugin.requires = _requirements(plugin.factory)
            if missing := [text for text in plugin.requires if not _is_met(text)]:
                todo = _quoted(_with_extras(missing, plugin.distribution))
                plugin.fail(f"needs {', '.join(missing)}: pip install {todo}", Status.MISSING)
                return
            _instantiate(plugin)
            if plugin.instance is not None:
                _check_hooks(plugin)
    except Exception as error:
        plugin.fail_of(error, located(error, plugin.file))


def _instantiate(plugin: Plugin) -> None:
    if not plugin.is_class:
        plugin.instance = plugin.factory
        return
    base = BASES.get(plugin.kind)
    if base and not issubclass(plugin.factory, base):
        plugin.fail(f"the class {plugin.factory.__name__} is not derived from invarlock.core.api.{base.__name__}")
        return
    try:
        with contained():
            plugin.instance = plugin.factory()
    except Exception as error:
        plugin.fail_of(error, f"cannot be constructed without options: {one_line(error)}")


def _check_hooks(plugin: Plugin) -> None:
    candidates = {
        name: getattr(plugin.instance, name) for name in dir(plugin.instance) if name.startswith("invarlock_")
    }
    marked = {name for name, value in candidates.items() if hook_marks(value)}
    for name in sorted(candidates):
        if name in marked and name not in HOOKS:
            plugin.fail(f"unknown hook {name!r}{nearest(name, HOOKS)}")
        elif name not in marked and name in HOOKS and callable(candidates[name]):
            plugin.fail(f"{name} is not marked; put @invarlock.hookimpl above it")
        elif name in marked:
            _check_form(plugin, name, candidates[name])
            _check_arguments(plugin, name, candidates[name])
    if not marked and plugin.status is Status.READY:
        plugin.fail(f"{plugin.module} implements no hook; known are {', '.join(HOOKS)}")
    plugin.hooks = tuple(sorted(marked & set(HOOKS)))


def _check_form(plugin: Plugin, hook: str, function: Any) -> None:
    """A wrapper yields, and nothing else does."""
    marks = hook_marks(function)
    if marks.get("hookwrapper"):
        plugin.fail(f"{hook}: hookwrapper=True is the old form; take wrapper=True, and return the result")
    elif marks.get("wrapper") and not inspect.isgeneratorfunction(function):
        plugin.fail(f"{hook}: a wrapper has to yield once, and return what the yield gave")
    elif not marks.get("wrapper") and inspect.isgeneratorfunction(function):
        plugin.fail(f"{hook}: yields; return the result, or mark it with wrapper=True")
    elif inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        plugin.fail(f"{hook}: is asynchronous, and nobody would await it; define it with def")


def _check_arguments(plugin: Plugin, hook: str, function: Any) -> None:
    given = inspect.signature(getattr(hookspecs, hook)).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            plugin.fail(f"{hook}: {parameter} would never be passed; name arguments of the hook: {', '.join(given)}")
        elif name not in given:
            hint = nearest(name, given) or f"; it has {', '.join(given)}"
            plugin.fail(f"{hook} has no argument {name!r}{hint}")
        elif parameter.default is not parameter.empty:
            plugin.fail(f"{hook}: the argument {name!r} has a default, so it would never be passed; remove the default")


_NAME_ALONE = re.compile(r"[\w.-]+")
_OF_EXTRA = re.compile(r"([\w.-]+).*\bextra == ['\"]([\w.-]+)")
"""A requirement of an extra, as the metadata of a distribution have it: its name, and the extra."""


def _requirements(factory: Any) -> tuple[str, ...]:
    """The distributions that a plugin says it needs, as they stand in ``dependencies`` of a ``pyproject.toml``.

    :raises ValueError: it says so in another form.
    """
    stated = getattr(factory, "requires", ())
    if not isinstance(stated, list | tuple) or not all(isinstance(text, str) for text in stated):
        raise ValueError(f"requires is {stated!r}, not a list of requirements such as ['numpy>=1.26']")
    for text in stated:
        if not _NAME_ALONE.fullmatch(text):
            _parsed(text)
    return tuple(stated)


def _parsed(text: str) -> Any:
    # Only here: a name alone needs no parser, and start-up counts milliseconds.
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"requires: {text!r} is no requirement: {str(error).splitlines()[0]}") from None


def installed_version(requirement: str) -> str | None:
    """The version of the distribution that a requirement is about; None where it is not installed."""
    name = requirement if _NAME_ALONE.fullmatch(requirement) else _parsed(requirement).name
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_met(requirement: str) -> bool:
    version = installed_version(requirement)
    if _NAME_ALONE.fullmatch(requirement):
        return version is not None
    parsed = _parsed(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return True
    return version is not None and parsed.specifier.contains(version, prereleases=True)


def _with_extras(missing: Iterable[str], distribution: str | None) -> list[str]:
    """Requirements, or the extras of a plugin's own distribution that bring them."""
    stated = (importlib.metadata.requires(distribution) or []) if distribution else []
    # The first extra wins: one for tests may come later.
    extras = {found[1]: f"{distribution}[{found[2]}]" for text in reversed(stated) if (found := _OF_EXTRA.match(text))}
    return list(dict.fromkeys(extras.get(text, text) for text in missing))


def _quoted(requirements: Iterable[str]) -> str:
    """Requirements as a shell takes them: ``>`` would redirect."""
    return " ".join(text if _NAME_ALONE.fullmatch(text) else f"'{text}'" for text in requirements)
