"""A YAML file and the command line -> ``RunConfig``; every mistake is one line with file, line and key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from invarlock.config.schema import Key, RunConfig, keys
from invarlock.core.errors import UsageError, nearest

PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
KNOWN_GUARD_KEYS = ("order", "fail_fast")


@dataclass
class Source:
    """Where each key of a configuration was written, for the error that names it."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str) -> UsageError:
        """The one line about a key, at the nearest place that was written down: the key's own, or its parent's."""
        place = key
        while place and place not in self.places:
            place = place.rpartition(".")[0]
        return UsageError(f"{self.places.get(place, self.name)}: {key or 'configuration'}: {problem}")


def load(path: str | None, settings: Iterable[str] = (), overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration: the command line over the file over the defaults.

    :param path: a YAML file; None for an empty one.
    :param settings: ``KEY=VALUE`` as given with ``--set``; the key is dotted, the value is YAML.
    :param overrides: dotted keys from options such as ``--device``, set last.
    :raises UsageError: for anything wrong, with file, line, key and the nearest known key.
    """
    source = read_yaml(path) if path is not None else Source("configuration")
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise UsageError(f"--set {setting}: expected KEY=VALUE, for example edit.plan.bitwidth=4")
        set_key(source, key.strip(), parse_scalar(setting, value), f"--set {setting}")
    for key, value in (overrides or {}).items():
        set_key(source, key, value, f"option for {key}")
    return validate(source)


def read_yaml(path: str) -> Source:
    """Read a file into plain values, remembering the line of each key; duplicate keys are errors."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder, not a configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a configuration: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"{path}{line}: not valid YAML: {problem}") from None
    if node is None:
        raise UsageError(f"{path}: the file is empty; at least model.id is needed")
    source = Source(path)
    value = _plain(node, "", source)
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {_kind(value)}")
    source.values = value
    return source


def _plain(node: yaml.Node, key: str, source: Source) -> Any:
    source.places[key] = f"{source.name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN_TAGS:
        raise source.error(key, f"the tag {node.tag} is not allowed")
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, key, source)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{key}.{number}", source) for number, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except yaml.YAMLError:
        raise source.error(key, f"the tag {node.tag} is not allowed") from None


def _plain_mapping(node: yaml.MappingNode, parent: str, source: Source) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        key = f"{parent}.{name}" if parent else name
        source.places[key] = f"{source.name}:{key_node.start_mark.line + 1}"
        if name in mapping:
            raise source.error(key, "the key is given twice")
        mapping[name] = _plain(value_node, key, source)
        source.places[key] = f"{source.name}:{key_node.start_mark.line + 1}"
    return mapping


def parse_scalar(setting: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {setting}: the value is not valid YAML") from None


def set_key(source: Source, key: str, value: Any, place: str) -> None:
    """Put a value under a dotted key."""
    *parents, last = key.split(".")
    section = source.values
    for parent in parents:
        entry = section.setdefault(parent, {})
        if not isinstance(entry, dict):
            raise UsageError(f"{place}: {parent} holds a value, not keys")
        section = entry
    section[last] = value
    source.places[key] = place


def validate(source: Source) -> RunConfig:
    values = dict(source.values)
    if isinstance(values.get("guards"), dict):
        values["guards"] = _gather_guard_options(values["guards"], source)
    try:
        config = TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise _explain(error.errors()[0], source) from None
    _check_across_keys(config, source)
    return config


def _gather_guard_options(guards: dict[str, Any], source: Source) -> dict[str, Any]:
    """Split ``guards`` into its own keys and the sections of the guards."""
    own = {name: value for name, value in guards.items() if name in KNOWN_GUARD_KEYS}
    sections = {name: value for name, value in guards.items() if name not in KNOWN_GUARD_KEYS}
    for name, value in sections.items():
        if not isinstance(value, dict):
            problem = f"expected the options of a guard {name!r} as a mapping, found {_kind(value)}"
            raise source.error(f"guards.{name}", problem + nearest(name, KNOWN_GUARD_KEYS))
    return {**own, "options": sections}


def _explain(error: Any, source: Source) -> UsageError:
    path = [str(part) for part in error["loc"]]
    if path[:2] == ["guards", "options"]:
        del path[1]
    key = ".".join(path)
    if error["type"] == "unexpected_keyword_argument":
        return source.error(key, "unknown key" + _nearest_key(key))
    if error["type"] == "missing":
        return source.error(key, "is required")
    known = {entry.path: entry for entry in keys()}
    expected = known[key].type if key in known else error["msg"].removeprefix("Input should be ")
    expected = "a mapping of keys" if error["type"] == "dataclass_type" else expected
    close = nearest(str(error["input"]), expected.split(" | ")) if " | " in expected else ""
    return source.error(key, f"expected {expected}, found {_kind(error['input'])}{close}")


def _nearest_key(key: str) -> str:
    """The nearest known key of the same section, else the nearest of all."""
    parent, _, name = key.rpartition(".")
    known = [entry.path for entry in keys()]
    siblings = {
        path.removeprefix(f"{parent}." if parent else "").split(".")[0] for path in known if _is_below(path, parent)
    }
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    return nearest(name, siblings) or (
        f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known are {', '.join(sorted(siblings))}"
    )


def _is_below(path: str, parent: str) -> bool:
    return not parent or path.startswith(f"{parent}.")


def _check_across_keys(config: RunConfig, source: Source) -> None:
    dataset, plan = config.dataset, config.edit.plan
    if dataset.provider in ("local_jsonl", "local_text", "hf") and not dataset.path:
        raise source.error("dataset.path", f"is required by provider {dataset.provider}")
    if dataset.provider in ("generated", "demo") and dataset.path:
        raise source.error(
            "dataset.path", f"provider {dataset.provider} reads no path; did you mean provider: local_jsonl?"
        )
    if dataset.stride is not None and dataset.stride < dataset.seq_len:
        raise source.error("dataset.stride", f"windows must not overlap: at least seq_len ({dataset.seq_len})")
    if plan.group_size is not None and not plan.per_channel:
        raise source.error("edit.plan.group_size", "groups lie within output channels: it needs per_channel: true")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{value!r}" if not isinstance(value, bool) else str(value).lower()


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the configuration file, with each key's sentence, for editors."""
    schema = TypeAdapter(RunConfig).json_schema()
    sentences = {entry.path: entry for entry in keys()}
    _describe(schema, schema, "", sentences)
    guards = schema["$defs"]["GuardsConfig"]
    guards["additionalProperties"] = guards["properties"].pop("options")["additionalProperties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _describe(section: dict[str, Any], schema: dict[str, Any], prefix: str, sentences: Mapping[str, Key]) -> None:
    for name, entry in section["properties"].items():
        if "$ref" in entry:
            _describe(schema["$defs"][entry["$ref"].rpartition("/")[2]], schema, f"{prefix}{name}.", sentences)
        elif prefix + name in sentences:
            entry["description"] = sentences[prefix + name].sentence
