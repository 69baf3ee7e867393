"""YAML text -> plain values, with the place of each key; what readers of YAML disagree about is an error.

Scalars are read as YAML 1.2 does: ``1e-3`` is a number, a date is text. What 1.1 and 1.2 read differently, such as
``no``, ``010`` and ``1:30``, has to be quoted or written out.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from invarlock.core.errors import UsageError, named_by
from invarlock.core.paths import absolute, regular_file

DEPTH = 32
"""Levels of nesting: a configuration has four, and an option of a guard a few of its own."""
LARGEST = 2**20
"""Values and characters in all, once aliases are expanded: far more than a configuration has, and soon read."""
DIGITS = 18
"""An integer of so many digits fits the 64 bits that torch and JSON's readers have."""
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
AMBIGUOUS = f"{TAG}ambiguous"

NULL = r"~|null|Null|NULL|"
BOOL = r"true|True|TRUE|false|False|FALSE"
INT = r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"
FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|"
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
OTHERWISE = (
    r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|[-+]?0[0-7_]+|0o[0-7]+|[-+]?0b[01_]+|"
    r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[-+]?0[0-9]+|[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?|"
    r"[-+]?0x[0-9a-fA-F_]+"
)
"""Scalars that one of YAML 1.1 and 1.2 reads as a truth value or a number, and the other as something else."""


class _Loader(yaml.SafeLoader):
    """Composes nodes whose tags are those of YAML 1.2."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own, which must not be shared


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text, 0)


def _number(text: str) -> float:
    if text[-1].isalpha() or not math.isfinite(float(text)):
        raise ValueError(f"{text} is not finite, and every number of a configuration is")
    return float(text)


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} holds half a surrogate pair, which is no text") from None
    return text


def _ambiguous(text: str) -> NoReturn:
    remedy = f"quote it if it is text ('{text}'), else write true, false or a plain decimal number"
    raise ValueError(f"readers of YAML disagree about {text}: {remedy}")


SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    f"{TAG}null": (NULL, lambda text: None),
    f"{TAG}bool": (BOOL, lambda text: text.lower() == "true"),
    f"{TAG}int": (INT, _integer),
    f"{TAG}float": (f"{FLOAT}|{INT}", _number),
    MERGE: ("<<", _text),
    AMBIGUOUS: (OTHERWISE, _ambiguous),
    f"{TAG}str": (r"(?s:.*)", _text),
}
"""Pattern and reader by tag; a plain scalar has the tag of the first pattern that it matches."""

for _tag, (_pattern, _) in SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), None)


@dataclass
class Source:
    """Values of a configuration, and the place of each key for the error that names it."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str) -> UsageError:
        """The one line about a key, at the nearest place that was written down: the key's own, or its parent's."""
        # Items of lists are noted as keys.
        place = re.sub(r"\[(\d+)\]", r".\1", key)
        while place and place not in self.places:
            place = place.rpartition(".")[0]
        return UsageError(f"{self.places.get(place, self.name)}: {key or 'configuration'}: {problem}")


def read_file(path: str) -> Source:
    """Read a file into plain values, remembering the line of each key; duplicate keys are errors.

    :raises UsageError: it cannot be read, or is no mapping.
    """
    with named_by("configuration"):
        regular_file(Path(path), "give a YAML file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{absolute(path)}: cannot be read as a configuration: {error}") from None
    node = _composed(text, path)
    if node is None:
        raise UsageError(f"{path}: the file is empty; at least model.id is needed")
    source = Source(path)
    value = _Reader(source, lambda node: f"{path}:{node.start_mark.line + 1}").value(node, "")
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {kind(value)}")
    source.values = value
    return source


def read_setting(setting: str, key: str, text: str, source: Source) -> Any:
    """The value of ``--set KEY=VALUE``, read as in a file.

    :raises UsageError: it is no value.
    """
    place = f"--set {setting}"
    node = _composed(text, place)
    written = Source(place)
    value = None if node is None else _Reader(written, lambda node: place).value(node, key)
    source.places |= written.places
    return value


def kind(value: Any) -> str:
    """Name of a value in a message."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return textwrap.shorten(f"{value!r}", 80) if not isinstance(value, bool) else str(value).lower()


def _composed(text: str, where: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise UsageError(f"{where}: nested more than {DEPTH} levels deep") from None
    # Escapes of characters that there are not are no YAMLError.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and not where.startswith("--set") else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{where}{line}: not valid YAML: {problem}") from None
    return node


class _Reader:
    """Plain values of nodes; places go to the source."""

    def __init__(self, source: Source, place_of: Callable[[yaml.Node], str]) -> None:
        self.source, self.place_of = source, place_of
        self.size = 0
        self.open: list[yaml.Node] = []
        """The nodes that the one at hand lies in."""

    def value(self, node: yaml.Node, key: str) -> Any:
        self.source.places.setdefault(key, self.place_of(node))
        self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if any(node is parent for parent in self.open):
            raise self.source.error(key, "an alias of what it lies in has no end")
        if len(self.open) == DEPTH:
            raise self.source.error(key, f"nested more than {DEPTH} levels deep")
        if self.size > LARGEST:
            raise self.source.error(key, f"more than {LARGEST} values and characters once aliases are expanded")
        self.open.append(node)
        try:
            return self._plain(node, key)
        finally:
            self.open.pop()

    def _plain(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if node.tag not in (f"{TAG}map", f"{TAG}seq"):
            raise self._tag_error(node, key)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        return [self.value(item, f"{key}.{number}") for number, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, parent: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                continue
            name = self._name(key_node, parent)
            key = f"{parent}.{name}" if parent else name
            if name in mapping:
                raise UsageError(f"{self.place_of(key_node)}: {key}: the key is given twice")
            self.source.places.setdefault(key, self.place_of(key_node))
            mapping[name] = self.value(value_node, key)
        for other in self._merged(node):
            value = self.value(other, parent)
            if not isinstance(value, dict):
                raise self.source.error(parent, f"<< merges mappings, found {kind(value)}")
            # What is written out goes before what is merged, and the first of a list before the next.
            mapping = value | mapping
        return mapping

    @staticmethod
    def _merged(node: yaml.MappingNode) -> Iterator[yaml.Node]:
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                yield from value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]

    def _name(self, node: yaml.Node, parent: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise UsageError(f"{self.place_of(node)}: {parent or 'configuration'}: a key has to be a word")
        try:
            return _text(node.value)
        except ValueError as error:
            raise UsageError(f"{self.place_of(node)}: {parent or 'configuration'}: a key: {error}") from None

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        if node.tag not in SCALARS:
            raise self._tag_error(node, key)
        pattern, read = SCALARS[node.tag]
        if not re.fullmatch(pattern, node.value):
            raise self.source.error(key, f"{node.value!r} is no {node.tag.removeprefix(TAG)}")
        try:
            return read(node.value)
        except ValueError as error:
            raise self.source.error(key, str(error)) from None

    def _tag_error(self, node: yaml.Node, key: str) -> UsageError:
        return self.source.error(key, f"the tag {node.tag} is not allowed")
