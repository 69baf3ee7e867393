"""A YAML file and the command line -> ``RunConfig``; every mistake is one line with file, line and key."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from invarlock.config.reading import DEPTH, Source, kind, read_file, read_setting
from invarlock.config.rules import read_rules
from invarlock.config.schema import PATHS, PLAN, EditConfig, RunConfig, as_keys, keys
from invarlock.core.errors import UsageError, nearest
from invarlock.core.paths import PathError, given
from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import AUTO, PlanError

KNOWN_GUARD_KEYS = ("order", "fail_fast")
ANCHORS = "x-"
"""Top-level keys that begin so are free for what is used elsewhere by its anchor."""


def load(path: str | None, settings: Iterable[str] = (), overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration: the command line over the file over the defaults.

    :param path: a YAML file; None for an empty one.
    :param settings: ``KEY=VALUE`` as given with ``--set``; the key is dotted, the value is YAML.
    :param overrides: dotted keys from options such as ``--device``, set last.
    :raises UsageError: for anything wrong, with file, line, key and the nearest known key.
    """
    source = read_file(path) if path is not None else Source("configuration")
    for setting in settings:
        key, separator, value = setting.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")) or key.count(".") > DEPTH:
            raise UsageError(f"--set {setting}: expected KEY=VALUE, for example edit.plan.bitwidth=4")
        set_key(source, key, read_setting(setting, key, value, source), f"--set {setting}")
    source.values = {key: value for key, value in source.values.items() if not key.startswith(ANCHORS)}
    # Those of options have been, when they were read.
    _expand_paths(source, [key for key in PATHS if key not in (overrides or {})])
    for key, value in (overrides or {}).items():
        set_key(source, key, value, f"option for {key}")
    return validate(source)


def set_key(source: Source, key: str, value: Any, place: str) -> None:
    """Put a value under a dotted key."""
    *parents, last = key.split(".")
    section = source.values
    for parent in parents:
        entry = section.setdefault(parent, {})
        if not isinstance(entry, dict):
            raise UsageError(f"{place}: {parent} holds {kind(entry)}, not keys")
        section = entry
    section[last] = value
    source.places[key] = place


def _expand_paths(source: Source, paths: Iterable[str]) -> None:
    for path in paths:
        section, _, key = path.partition(".")
        values = source.values.get(section)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            try:
                values[key] = given(values[key])
            except PathError as error:
                raise source.error(path, str(error)) from None


@cache
def _run_config() -> TypeAdapter[RunConfig]:
    """Made once: that takes longer than to check a configuration with it."""
    return TypeAdapter(RunConfig)


def validate(source: Source) -> RunConfig:
    values = dict(source.values)
    if isinstance(values.get("guards"), dict):
        values["guards"] = _gather_guard_options(values["guards"], source)
    rules, searched = _take_rules(values, source), _take_auto(values)
    try:
        config = _run_config().validate_json(json.dumps(values, default=str), strict=True)
        if searched:
            config = _with_plan(config, dataclasses.replace(config.edit.plan, bitwidth=AUTO))  # type: ignore[arg-type]
    except ValidationError as error:
        raise _explain(error.errors()[0], source) from None
    except PlanError as error:
        key, _, problem = as_keys(str(error)).partition(" ")
        raise source.error(key, problem) from None
    if rules is not None:
        config = _with_plan(config, rules)
    _check_across_keys(config, source)
    return _with_limit(config)


def _with_plan(config: RunConfig, plan: Any) -> RunConfig:
    return dataclasses.replace(config, edit=dataclasses.replace(config.edit, plan=plan))


def _with_limit(config: RunConfig) -> RunConfig:
    """The configuration, whose verdict is held against the limit that a search is for."""
    limit = config.edit.target.max_pm_ratio
    return (
        config
        if limit is None
        else dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_pm_ratio=limit))
    )


def _take_auto(values: dict[str, Any]) -> bool:
    """True if the bits are to be searched; that is taken out of the values."""
    edit = values.get("edit")
    plan = edit.get("plan") if isinstance(edit, dict) else None
    if not isinstance(edit, dict) or not isinstance(plan, dict) or plan.get("bitwidth") != AUTO:
        return False
    values["edit"] = {**edit, "plan": {key: value for key, value in plan.items() if key != "bitwidth"}}
    return True


def _take_rules(values: dict[str, Any], source: Source) -> Rules | None:
    """The plan, where it is a list of rules, taken out of the values."""
    edit = values.get("edit")
    if not isinstance(edit, dict) or not isinstance(edit.get("plan"), list):
        return None
    values["edit"] = {key: value for key, value in edit.items() if key != "plan"}
    return rules_of(edit["plan"], source)


def rules_of(listed: Any, source: Source) -> Rules:
    """The rules of a plan, as a file or a report has them.

    :raises UsageError: with the key, as ``edit.plan[1].match``.
    """
    return read_rules(listed, source, _explain)


def _gather_guard_options(guards: dict[str, Any], source: Source) -> dict[str, Any]:
    """Split ``guards`` into its own keys and the sections of the guards."""
    own = {name: value for name, value in guards.items() if name in KNOWN_GUARD_KEYS}
    sections = {name: value for name, value in guards.items() if name not in KNOWN_GUARD_KEYS}
    for name, value in sections.items():
        if not isinstance(value, dict):
            problem = f"expected the options of a guard {name!r} as a mapping, found {kind(value)}"
            raise source.error(f"guards.{name}", problem + nearest(name, KNOWN_GUARD_KEYS))
    return {**own, "options": sections}


def _explain(error: Any, source: Source, section: str = "") -> UsageError:
    path = [str(part) for part in error["loc"]]
    if path[:2] == ["guards", "options"]:
        del path[1]
    known = {entry.path: entry for entry in keys()}
    # After a key of several types comes the type that its value is not.
    steps = path[:-1] if ".".join(path[:-1]) in known and not path[-1].isdigit() else path
    key = ".".join([section, *steps] if section else steps)
    if error["type"] == "unexpected_keyword_argument":
        return source.error(key, "unknown key" + _nearest_key(key))
    if error["type"] == "missing":
        return source.error(key, "is required")
    # A rule has the keys of a scheme, which a plan has, too.
    form = next((path for path in (re.sub(r"\[\d+\]", each, key) for each in ("[N]", "")) if path in known), None)
    expected = known[form].type if form else error["msg"].removeprefix("Input should be ")
    expected = "a mapping of keys" if error["type"] == "dataclass_type" else expected
    close = nearest(str(error["input"]), expected.split(" | ")) if " | " in expected else ""
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        close = "; quote it if it is text"
    return source.error(key, f"expected {expected}, found {kind(error['input'])}{close}")


def _nearest_key(key: str) -> str:
    """The nearest known key of the same section, else the nearest of all."""
    parent, dot, name = key.rpartition(".")
    section = parent + dot
    known = [entry.path for entry in keys()]
    siblings = {path.removeprefix(section).split(".")[0] for path in known if path.startswith(section)}
    if parent.startswith(f"{PLAN}["):
        known, siblings = [], {entry.name for entry in dataclasses.fields(Rule)}
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    return nearest(name, siblings) or (
        f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known are {', '.join(sorted(siblings))}"
    )


def _check_across_keys(config: RunConfig, source: Source) -> None:
    dataset = config.dataset
    if dataset.is_generated and dataset.path:
        raise source.error("dataset.path", "provider generated reads no path; did you mean provider: local_jsonl?")
    if dataset.stride is not None and dataset.stride < dataset.seq_len:
        raise source.error("dataset.stride", f"windows must not overlap: at least seq_len ({dataset.seq_len})")
    _check_search(config.edit, source)


def _check_search(edit: EditConfig, source: Source) -> None:
    target = edit.target
    if target.max_pm_ratio is not None and target.bits_per_weight is not None:
        raise source.error("edit.target", "max_pm_ratio and bits_per_weight are two targets: remove one")
    if target.is_set and not edit.is_searched:
        raise source.error("edit.target", f"is for a search, and {PLAN} has its bits: set edit.plan.bitwidth to auto")
    if edit.is_searched and edit.retry.max_attempts > 1:
        raise source.error("edit.retry.max_attempts", "a search has attempts of its own: edit.search.max_attempts")


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the configuration file, with each key's sentence, for editors."""
    schema = _run_config().json_schema()
    sentences = {entry.path: entry.sentence for entry in keys()}
    _describe(schema, schema, "", sentences)
    guards = schema["$defs"]["GuardsConfig"]
    guards["additionalProperties"] = guards["properties"].pop("options")["additionalProperties"]
    _allow_rules(schema, sentences)
    anchors = {"patternProperties": {f"^{ANCHORS}": True}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **anchors}


def _describe(section: dict[str, Any], schema: dict[str, Any], prefix: str, sentences: Mapping[str, str]) -> None:
    for name, entry in section["properties"].items():
        if "$ref" in entry:
            _describe(schema["$defs"][entry["$ref"].rpartition("/")[2]], schema, f"{prefix}{name}.", sentences)
        elif prefix + name in sentences:
            entry["description"] = sentences[prefix + name]


def _allow_rules(schema: dict[str, Any], sentences: Mapping[str, str]) -> None:
    """Let the plan be a list of rules."""
    rule = TypeAdapter(Rule).json_schema()
    patterns = rule["properties"]["match"]
    rule["properties"]["match"] = {"anyOf": [{"type": "string"}, {"type": "array", **patterns, "minItems": 1}]}
    rule["required"] = ["match"]
    for name, entry in rule["properties"].items():
        entry["description"] = sentences.get(f"{PLAN}[N].{name}") or sentences[f"{PLAN}.{name}"]
    schema["$defs"]["Rule"] = rule
    schema["$defs"]["Plan"]["properties"]["bitwidth"]["anyOf"].append({"const": AUTO})
    plan = schema["$defs"]["EditConfig"]["properties"]["plan"]
    listed = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Rule"}}
    schema["$defs"]["EditConfig"]["properties"]["plan"] = {"anyOf": [plan, listed]}
