"""One rule for every path that a user gives, in a configuration or with an option.

``~``, ``~NAME`` and ``${NAME}`` are expanded, and an undefined one is an error; a relative path is below the working
directory; what is not there is reported by its absolute path.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from invarlock.core.errors import InputError, UsageError

VARIABLE = re.compile(r"\$\{(?:([^}]*)\})?")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Kinds of files that would keep a reader waiting, or have no end."""


class PathError(ValueError):
    """A fault of a path; whoever catches it knows the key or the option."""


def given(text: str) -> str:
    """A path as the user meant it.

    :returns: the path, still relative where it was; there need not be anything.
    :raises PathError: it cannot be one.
    """
    path = _expanded(text)
    if not path.strip():
        raise PathError("is empty" if path == text else f"{text} is empty once its variables are expanded")
    if "\0" in path:
        raise PathError(f"{path!r} holds a NUL, which no path can")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise PathError(f"{path!r} is not UTF-8; rename the file or folder") from None
    if not Path(path).is_absolute():
        check_working_directory()
    try:
        kind = stat.S_IFMT(Path(path).stat().st_mode)
    except FileNotFoundError:
        return path
    except NotADirectoryError:
        if is_hub_id(path):
            return path
        raise PathError(f"{absolute(path)} lies below a file") from None
    except OSError as error:
        raise PathError(f"{absolute(path)}: {error.strerror}") from None
    if kind in KINDS:
        raise PathError(f"{absolute(path)} is {KINDS[kind]}, not a file or folder")
    return path


def absolute(path: str | Path) -> Path:
    """For a message: where a relative path was looked for."""
    try:
        return Path(path).absolute()
    except OSError:
        return Path(path)


def is_hub_id(text: str) -> bool:
    """True of a name that could be one on a hub: ``name`` or ``owner/name``, and nothing of that name is here."""
    return HUB_ID.fullmatch(text) is not None and not Path(text).exists()


def regular_file(path: Path, to_do: str) -> None:
    """Refuse what cannot be read as a file.

    :raises InputError: it is not there, or is a folder, a named pipe or the like.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{absolute(path)} does not exist; {to_do}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{absolute(path)} cannot be read: {getattr(error, 'strerror', error)}") from None
    if kind == stat.S_IFDIR:
        raise InputError(f"{absolute(path)} is a folder; {to_do}")
    if kind in KINDS:
        raise InputError(f"{absolute(path)} is {KINDS[kind]}; {to_do}")


def _expanded(text: str) -> str:
    # Not by pathlib, which would make org/name of ./org/name.
    home = os.path.expanduser(text)  # noqa: PTH111
    if text.startswith("~") and home == text:
        raise PathError(f"{text}: there is no user {text.split('/')[0][1:]}; write ./{text} for a name that begins so")
    return VARIABLE.sub(_value, home)


def _value(variable: re.Match[str]) -> str:
    name = variable[1]
    if name is None:
        raise PathError(f"{variable.string}: ${{ is not closed")
    if name not in os.environ:
        raise PathError(f"{variable.string}: the environment variable {name!r} is not set")
    return os.environ[name]


def check_working_directory() -> None:
    """:raises UsageError: it was removed, and nothing can be relative to it."""
    try:
        Path.cwd()
    except OSError:
        raise UsageError("the working directory is gone; change to another one") from None
