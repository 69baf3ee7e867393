"""Whatever a plugin returns is plain data of a bounded size, or an error that names what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amounts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from invarlock.core.plain import METRICS, plain
from invarlock.core.results import Action, GuardResult, PrepareResult, contradiction
from invarlock.core.sections import ReportSection, extra_from_plugin

MOST_BYTES = 12_000_000
"""Of a result as JSON: all values and all text that the limits allow."""


class Raises:
    """Every method of it that could be called raises, whatever is asked."""

    def __init__(self, error: type[BaseException], methods: set[str]) -> None:
        object.__setattr__(self, "raised", (error, methods))

    def __getattribute__(self, name: str) -> Any:
        error, methods = object.__getattribute__(self, "raised")
        if name in methods:
            raise error(name)
        return object.__getattribute__(self, name)


def raising(name: str) -> Any:
    def method(self: Any, *arguments: Any) -> Any:
        raise object.__getattribute__(self, "raised")[0](name)

    return method


METHODS = ("__repr__", "__str__", "__iter__", "__len__", "__eq__", "__hash__", "__bool__", "items", "tolist", "shape")
HOSTILE = [
    type("Hostile", (Raises,), {name: raising(name) for name in names})
    for names in [(name,) for name in METHODS] + [METHODS]
]


class Endless(Sequence):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        return place


class EndlessNesting(Endless):
    def __getitem__(self, place: Any) -> Any:
        return EndlessNesting()


class EndlessMapping(Mapping):
    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[int]:
        return itertools.count()

    def __getitem__(self, key: Any) -> Any:
        return "x" * 1000


class Text(str):
    def __str__(self) -> str:
        raise SystemExit(0)

    __len__ = __getitem__ = encode = __repr__ = __str__


class Number(int):
    def __int__(self) -> int:
        raise SystemExit(0)

    __add__ = __repr__ = __str__ = __index__ = __int__


class Table(dict):
    def items(self) -> Any:
        raise GeneratorExit

    __iter__ = __len__ = keys = values = items


class Proxy:
    __class__ = property(lambda self: dict)
    __slots__ = ()


class Colour(enum.Enum):
    RED = "red"
    DEEP = ((1, 2),)


@dataclasses.dataclass
class Record:
    figure: Any


def cyclic(kind: type) -> Any:
    made: Any = kind()
    if kind is dict:
        made["again"] = made
    else:
        made.append(made)
    return made


def nested(depth: int) -> Any:
    made: Any = 0
    for _ in range(depth):
        made = [made]
    return made


ERRORS = [RuntimeError, SystemExit, GeneratorExit, RecursionError, MemoryError, StopIteration]
ODD: list[Any] = [
    lambda: itertools.count(), lambda: (number for number in itertools.count()), Endless, EndlessNesting, EndlessMapping,
    lambda: cyclic(dict), lambda: cyclic(list), lambda: nested(5000), lambda: [0] * 200_000, lambda: "y" * 2_000_000,
    lambda: 10**5000, lambda: -(10**400), lambda: float("nan"), lambda: float("-inf"), lambda: Text("text"),
    lambda: Number(7), lambda: Table(a=1), lambda: Proxy(), lambda: Record(Record(1)), lambda: Record, lambda: Colour.RED,
    lambda: Colour.DEEP, lambda: Action.WARN, lambda: datetime.datetime(2020, 1, 1), lambda: decimal.Decimal("NaN"),
    lambda: decimal.Decimal("1e999999"), lambda: Path("x"), lambda: b"\x00\xff" * 100_000, lambda: memoryview(b"ab"),
    lambda: {1, "1"}, lambda: {1: 1, "1": 2}, lambda: {b"k": 1, None: 2, (1,): 3}, lambda: collections.deque([1], 5),
    lambda: range(10**12), lambda: np.float32(1.5), lambda: np.bool_(True), lambda: np.longdouble(1), lambda: np.int64(2**60),
    lambda: np.array([1, None, {"a": 1}], dtype=object), lambda: np.zeros((3000, 1000)), lambda: np.datetime64("2020-01-01"),
    lambda: torch.tensor(True), lambda: torch.tensor(float("nan"), requires_grad=True), lambda: torch.ones(2, dtype=torch.bfloat16),
    lambda: torch.ones(2000), lambda: torch.ones(3, device="meta"), lambda: torch.ones(3).to_sparse(),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda: torch.nn.Linear(2, 2),
    lambda: torch.tensor([1 + 2j]), lambda: "\ud800\x00\x1b[31m", lambda: {"\ud800": "\udfff"}, lambda: complex(1, 2), lambda: ...,
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=8)
odd = st.sampled_from(ODD).map(lambda make: make())
hostile = st.builds(
    lambda kind, error, methods: kind(error, set(methods)),
    st.sampled_from(HOSTILE), st.sampled_from(ERRORS), st.lists(st.sampled_from(["__class__", "__dict__", *METHODS])),
)  # fmt: skip
anything = st.recursive(
    scalars | odd | hostile,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
        | inner.map(Record)
    ),
    max_leaves=8,
)
results = st.fixed_dictionaries(
    {"passed": st.booleans() | anything, "action": st.sampled_from([*Action, "none", None]) | anything},
    optional={"message": anything, "warnings": anything, "metrics": st.dictionaries(st.text(max_size=5), anything) | anything},
)  # fmt: skip
sections = st.fixed_dictionaries(
    {"title": st.text(min_size=1, max_size=5) | anything},
    optional={"text": anything, "columns": st.lists(scalars, max_size=3) | anything, "rows": st.lists(st.lists(anything, max_size=3)) | anything},
)  # fmt: skip

# Quantized tensors are deprecated; hypothesis counts the time in which large inputs are made.
pytestmark = pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore::DeprecationWarning")
thorough = settings(max_examples=examples(1_000), deadline=None, suppress_health_check=list(HealthCheck))


def assert_plain(value: Any) -> None:
    """It is what JSON gives back, and of a bounded size."""
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text) == value
    text.encode()
    assert len(text) < MOST_BYTES


@thorough
@given(results | anything)
def test_a_guards_result_is_plain_or_an_error_of_the_guard(returned: Any) -> None:
    result = GuardResult.from_plugin("g", returned)
    assert_plain({**dataclasses.asdict(result), "warnings": list(result.warnings)})
    assert contradiction(result.passed, result.action) is None
    assert (result.error is None) or (result.passed, result.action) == (False, Action.ABORT)
    assert type(result.message) is str and all(type(warning) is str for warning in result.warnings)


@thorough
@given(st.fixed_dictionaries({"ready": st.booleans() | anything}, optional={"more": anything}) | anything)
def test_what_prepare_returns_is_plain_or_an_error_of_the_guard(returned: Any) -> None:
    result = PrepareResult.from_plugin(returned)
    assert_plain(dataclasses.asdict(result))
    if result.ready:
        assert returned is None or returned.get("ready", True) is True


@thorough
@given(st.lists(sections, max_size=3) | anything)
def test_sections_are_plain_or_refused(returned: Any) -> None:
    with suppress(ValueError):
        found = ReportSection.all_from_plugin("p", returned)
        assert_plain([dataclasses.asdict(section) for section in found])
        assert all(len(row) == len(section.columns) for section in found for row in section.rows)


@thorough
@given(anything)
def test_anything_is_plain_data(returned: Any) -> None:
    assert_plain(plain(returned))
    assert_plain(plain([returned] * 3, METRICS))
    with suppress(ValueError):
        assert_plain(extra_from_plugin(returned))
