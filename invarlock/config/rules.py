"""``edit.plan`` as a list of rules: read rule by rule, so that a mistake names the rule that it is in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from invarlock.config.reading import Source, kind
from invarlock.config.schema import PLAN, as_keys
from invarlock.core.errors import UsageError
from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import PlanError


def read_rules(listed: Any, source: Source, explain: Callable[[Any, Source, str], UsageError]) -> Rules:
    """The rules of a list.

    :param explain: makes the one line of an error of pydantic, for the section that is named.
    :raises UsageError: with the key, as ``edit.plan[1].match``.
    """
    if not isinstance(listed, list):
        raise source.error(PLAN, f"expected a list of rules, found {kind(listed)}")
    try:
        return Rules(tuple(_rule(number, values, source, explain) for number, values in enumerate(listed)))
    except PlanError as error:
        raise source.error(PLAN, str(error)) from None


def _rule(number: int, values: Any, source: Source, explain: Callable[[Any, Source, str], UsageError]) -> Rule:
    place = f"{PLAN}[{number}]"
    if not isinstance(values, dict):
        raise source.error(place, f"expected a mapping with the key match, found {kind(values)}")
    if "match" not in values:
        raise source.error(f"{place}.match", "is required: a glob or re:REGEX of module names")
    if isinstance(values["match"], str):
        values = {**values, "match": [values["match"]]}
    try:
        return TypeAdapter(Rule).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise explain(error.errors()[0], source, place) from None
    except PlanError as error:
        key, _, problem = as_keys(str(error), place).partition(" ")
        raise source.error(key, problem) from None
