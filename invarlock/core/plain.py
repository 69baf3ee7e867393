"""Whatever a plugin returned as plain data: what JSON can hold, within limits.

Nothing here trusts an object: its methods may raise, lie or never end. So types are asked of ``type``, and what is a
``str``, ``int``, ``float``, ``list`` or ``dict`` underneath is read through the methods of those.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass
from enum import Enum
from io import IOBase
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The most that is kept of one value that a plugin returned."""

    characters: int
    """Of one text."""
    entries: int = 0
    """Of one list or dict."""
    values: int = 1
    """In all."""
    text: int = 0
    """Characters of all texts together."""
    depth: int = 0


METRICS = Limits(characters=10_000, entries=10_000, values=100_000, text=1_000_000, depth=32)
"""A figure for each weight of a large mixture, or ten for each of a usual model; about 5 MB of report.json, which
editors and browsers still open. Figures are nested three or four deep; JSON readers give up at 100 or more."""
MESSAGE = Limits(characters=4_000, text=4_000)
"""A page of text: it stands in one cell of a table."""
WARNINGS = Limits(characters=1_000, entries=1_000, values=10_000, text=200_000, depth=4)
"""Each is a line, and nobody reads more of them."""
SECTIONS = Limits(characters=4_000, entries=2_000, values=50_000, text=1_000_000, depth=4)
"""A page that a browser draws without a pause: a table of 2,000 rows, each with a cell for 25 figures."""
OWN = Limits(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize, depth=128)
"""Of what InvarLock itself measured: a model may have a million weights."""
ARRAY = 1_000
"""Numbers of a tensor that are listed; one that has more is a weight or an activation, and no figure."""
INTEGER_BITS = 1024
"""The range of a float: what is larger, few readers of JSON take."""
TOLD = 3
"""Cuts that are told one by one."""
TRACE = 20_000
"""Characters of a traceback: a hundred frames, and the ends of a longer one."""


class Unreadable(ValueError):
    """A plugin returned something unusable; the message is one line that names the fault."""


class Reader:
    """Reads one value, and keeps what had to be cut and what could not be read at all."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.limits = limits
        self.problem: str | None = None
        """The first place that holds no data, and why."""
        self._cuts: list[str] = []
        self._path = [name]
        self._open: set[int] = set()
        self._values, self._text = limits.values, limits.text

    @property
    def cut(self) -> str:
        """Cuts that were made, in one line; empty where there are none."""
        more = len(self._cuts) - TOLD
        return "; ".join(self._cuts[:TOLD]) + (f"; and {more:,} more cuts" if more > 0 else "")

    @classmethod
    def strict(cls, name: str, value: object, limits: Limits) -> tuple[Any, list[str]]:
        """The value as plain data, and what was cut of it, in one line if anything was.

        :raises Unreadable: it holds something that is no data.
        """
        reader = cls(name, limits)
        made = reader.read(value)
        if reader.problem:
            raise Unreadable(reader.problem)
        return made, [reader.cut] if reader.cut else []

    def read(self, value: object) -> Any:
        try:
            return self._read(value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self._unreadable(f"{kind_name(value)} raises {kind_name(error, article=False)}")

    def _read(self, value: Any) -> Any:
        kind = type(value)
        self._values -= 1
        if value is None or kind is bool:
            return value
        if issubclass(kind, str):
            return self._kept_text(value)
        if issubclass(kind, int):
            return self._integer(int.__int__(value))
        if issubclass(kind, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else str(number)
        if issubclass(kind, Enum):
            return self._read(object.__getattribute__(value, "_value_"))
        if issubclass(kind, bytes | bytearray | memoryview):
            return self._kept_text(repr(bytes(memoryview(value)[: self.limits.characters])))
        if issubclass(kind, Mapping) or dataclasses.is_dataclass(kind):
            return self._nested(value, self._dict)
        if issubclass(kind, Sequence | Set | ValuesView | deque | Iterator) and not issubclass(kind, IOBase):
            return self._nested(value, self._list)
        if all(hasattr(kind, name) for name in ("shape", "dtype", "tolist")):
            return self._array(value)
        return self._kept_text(str(value))

    def _integer(self, number: int) -> Any:
        if (bits := number.bit_length()) > INTEGER_BITS:
            return self._unreadable(f"an integer of {bits:,} bits is too large")
        return number

    def _kept_text(self, text: str) -> str:
        length, most = str.__len__(text), max(0, min(self.limits.characters, self._text))
        kept = str.__getitem__(text, slice(most))
        self._text -= len(kept)
        if length > most:
            self._note(f"{most:,} of {length:,} characters are kept")
        # A lone surrogate, as in a path that is not UTF-8, could not be written.
        return kept.encode("utf-8", "replace").decode()

    def _nested(self, value: Any, read: Any) -> Any:
        if id(value) in self._open:
            return self._unreadable("it holds itself")
        if len(self._open) == self.limits.depth:
            return self._unreadable(f"it is nested more than {self.limits.depth} deep")
        self._open.add(id(value))
        try:
            return read(value)
        finally:
            self._open.discard(id(value))

    def _dict(self, value: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, entry in self._within(_items(value), value):
            name = self._kept_text(key if issubclass(type(key), str) else str(key))
            if name in made:
                self._unreadable(f"two keys read {name[:50]!r}")
            made[name] = self._at(f".{name}", entry)
        return made

    def _list(self, value: Any) -> list[Any]:
        return [self._at(f"[{place}]", entry) for place, entry in enumerate(self._within(_entries(value), value))]

    def _within(self, entries: Iterator[Any], value: object) -> Iterator[Any]:
        """The entries that the limits have room for."""
        for count, entry in enumerate(entries):
            if count == self.limits.entries or self._values <= 0:
                size = _size(value)
                self._note(f"{count:,} of {size:,} values are kept" if size else f"the first {count:,} values are kept")
                return
            yield entry

    def _at(self, step: str, entry: object) -> Any:
        self._path.append(step)
        try:
            return self.read(entry)
        finally:
            self._path.pop()

    def _array(self, array: Any) -> Any:
        shape = tuple(map(int, array.shape))
        described = f"{kind_name(array, article=False)} of shape {shape}, {array.dtype}"
        if math.prod(shape) <= ARRAY:
            try:
                listed = array.tolist()
            except (TypeError, ValueError, RuntimeError):
                # Those without numbers of their own: on the meta device, sparse, quantized.
                listed = array
            if type(listed) is not type(array):
                return self._read(listed)
        self._note("a tensor is cut to its shape")
        return self._kept_text(described)

    def _note(self, what: str) -> None:
        self._cuts.append(f"{self._place}: {what}")

    def _unreadable(self, why: str) -> str:
        self.problem = self.problem or f"{self._place}: {why}"
        return f"<{why}>"

    @property
    def _place(self) -> str:
        return " ".join("".join(self._path).split())[:100]


def plain(value: object, limits: Limits = METRICS) -> Any:
    """Bring any object to what JSON can hold, cut to the limits; what cannot be read becomes a text that says why.

    Small tensors and arrays become numbers or lists, others a text with their shape. JSON has no NaN and no infinity:
    they become the strings ``"nan"``, ``"inf"`` and ``"-inf"``, so that a reader can tell them from what was not
    measured (``null``).
    """
    return Reader("value", limits).read(value)


def as_text(value: Any) -> str:
    """Plain data as one text."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def shortened(text: str, most: int = TRACE) -> str:
    """Both ends of a text that is too long."""
    half, left_out = most // 2, len(text) - most
    return f"{text[:half]}\n[{left_out:,} characters are left out]\n{text[-half:]}" if left_out > 0 else text


def kind_name(value: object, *, article: bool = True) -> str:
    """``a Tensor``; of a class that is called as a built-in one, with its module: ``a numpy.bool``."""
    kind = type(value)
    known = kind.__module__ == "builtins" or kind.__name__ not in ("bool", "int", "float", "str", "dict", "list")
    name = " ".join((kind.__name__ if known else f"{kind.__module__}.{kind.__name__}").split())[:80]
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}" if article else name


def _items(value: Any) -> Iterator[tuple[object, object]]:
    if issubclass(type(value), dict):
        return iter(dict.items(value))
    if dataclasses.is_dataclass(value):
        return ((field.name, object.__getattribute__(value, field.name)) for field in dataclasses.fields(value))
    return ((key, value[key]) for key in value)


def _entries(value: Any) -> Iterator[object]:
    kind = next((kind for kind in (list, tuple, set, frozenset, deque) if issubclass(type(value), kind)), None)
    return kind.__iter__(value) if kind else iter(value)


def _size(value: Any) -> int | None:
    """Number of entries; None where only the object itself could tell."""
    kinds = (dict, list, tuple, set, frozenset, deque, range)
    kind = next((kind for kind in kinds if issubclass(type(value), kind)), None)
    return kind.__len__(value) if kind else None
