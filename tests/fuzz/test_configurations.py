"""Configurations at random: read, or refused with one line and exit status 2; never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from amounts import examples
from conftest import DEMO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from invarlock.config.loading import load
from invarlock.config.schema import keys
from invarlock.core.errors import UsageError, one_line

SCALARS = st.sampled_from(
    [
        "~",
        "null",
        "true",
        "no",
        "on",
        "010",
        "0x1F",
        "0b11",
        "0o17",
        "1_000",
        "1:30",
        "190:20:30.15",
        "1e-3",
        "1e999",
        ".inf",
        "-.INF",
        ".nan",
        "2024-13-45",
        "2024-01-01",
        "=",
        "<<",
        "12345678901234567890123",
        "!!int",
        "x",
        "!!binary",
        "aa",
        "!!set",
        "{a}",
        "&a",
        "*a",
        "*b",
        "${HOME}",
        "${NOWHERE}",
        "${",
        "~",
        "~nobody",
        ".",
        "/",
        "''",
        "'8'",
        '"\\uD800"',
        '"\\UFFFFFFFF"',
        '"\\0"',
        "[]",
        "{}",
        "[[1]]",
        "{a:",
        "1}",
        "demo",
        "hf",
        "local_jsonl",
        "ffn",
        "all",
        "gguf",
        "auto",
        "cuda:9",
        "cpu",
    ]
)
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("{}[]:,&*!|>%@`'\"#-?\n\t \0\ufeff\x85"), max_size=60)
PATHS = [key.path for key in keys() if "NAME" not in key.path]


def _nested(path: str, value: str) -> str:
    """YAML of one dotted key."""
    *parents, last = path.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parents)]
    return "\n".join([*lines, f"{'  ' * len(parents)}{last}: {value}"]) + "\n"


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """The configuration of the demo, with pieces taken out, doubled, or put in."""
    text = yaml.safe_dump(
        yaml.safe_load((DEMO / "config.yaml").read_text()) | {"model": {"id": str(DEMO / "checkpoint")}}
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(SCALARS | TEXT | st.just(text[start:end] * 2)) + text[end:]
    return text


DOCUMENTS = st.one_of(
    TEXT,
    _mutated(),
    st.builds(_nested, st.sampled_from(PATHS), SCALARS | TEXT),
    st.builds(lambda anchor, key: f"x-a: &a {anchor}\nmodel: {{id: here, <<: *a}}\nplugins: {key}\n", SCALARS, SCALARS),
    st.builds(lambda opening, count: opening * count, st.sampled_from(["[", "{a: ", "- ", "? ", "&a [", "!!x "]), st.integers(1, 300)),
)  # fmt: skip
SETTINGS = st.lists(st.builds(lambda key, value: f"{key}={value}", st.sampled_from([*PATHS, "x-a", "", ".", "guards.spectral.a", "model"]) | TEXT, SCALARS | TEXT), max_size=2)  # fmt: skip


@settings(max_examples=examples(10_000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=DOCUMENTS, given_settings=SETTINGS, encoding=st.sampled_from(["utf-8", "utf-8", "utf-16"]), data=st.data())
def test_a_configuration_is_read_or_refused(
    text: str, given_settings: list[str], encoding: str, data: st.DataObject, invarlock: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    said = _refusal(str(path), given_settings)
    # The command line adds what it costs to start it.
    if said is not None and data.draw(st.integers(0, 9)) == 0:
        done = invarlock("run", "-c", path, *(f"--set={setting}" for setting in given_settings))
        assert (done.code, done.err) == (2, f"invarlock: error: {said}\n")


def _refusal(path: str, given_settings: list[str]) -> str | None:
    try:
        load(path, given_settings)
    except UsageError as error:
        return one_line(error)
    return None
