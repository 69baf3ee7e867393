"""Checkpoints damaged at random: a verdict, or one line with exit status 2; never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from amounts import examples
from broken_checkpoints import BROKEN, WEIGHTS, of_weights
from conftest import DEMO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**15, 2**31, 2**63, -(2**31), 10**30, 1e-3, 1e308, -0.5, "", "x", "4", "auto", "\0", "é" * 300]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(["type", "rope_type", "quant_method", "a"]), st.sampled_from(["x", 1, None])),
)
Damage = Callable[[Path], object]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value, those of long lists and vocabularies left out but for a few."""
    below = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())[:40]
    return [path, *(place for key, item in below for place in _places(item, (*path, key)))]


@st.composite
def _json_damage(draw: st.DrawFn) -> Damage:
    name = draw(st.sampled_from(JSON_FILES))
    whole = json.loads((DEMO / "checkpoint" / name).read_text())
    place, value = draw(st.sampled_from(_places(whole))), draw(VALUES)
    extra = draw(
        st.sampled_from([None, "quantization_config", "rope_scaling", "auto_map", "layer_types", "is_decoder"])
    )

    def damage(folder: Path) -> None:
        root = json.loads((folder / name).read_text())
        if extra and isinstance(root, dict):
            root[extra] = value
        elif not place:
            root = value
        else:
            section = root
            for key in place[:-1]:
                section = section[key]
            section[place[-1]] = value
        (folder / name).write_text(json.dumps(root))

    return damage


@st.composite
def _byte_damage(draw: st.DrawFn) -> Damage:
    name = draw(st.sampled_from([*JSON_FILES, WEIGHTS]))
    share, bit = draw(st.floats(0, 1)), draw(st.integers(0, 7))
    # The header of the weights is where a flipped bit tells most.
    early, cut = draw(st.booleans()), draw(st.booleans())

    def damage(folder: Path) -> None:
        path = folder / name
        size = min(path.stat().st_size, 2048) if early else path.stat().st_size
        if cut:
            os.truncate(path, int(share * size))
            return
        content = bytearray(path.read_bytes())
        content[min(int(share * size), len(content) - 1)] ^= 1 << bit
        path.write_bytes(content)

    return damage


@st.composite
def _tensor_damage(draw: st.DrawFn) -> Damage:
    place, how = draw(st.integers(0, 30)), draw(st.integers(0, 5))

    def change(state: dict[str, torch.Tensor]) -> None:
        name = sorted(state)[place % len(state)]
        tensor = state.pop(name)
        replaced = [
            {},
            {f"{name}.more": tensor},
            {name: tensor.flatten()[:-1].clone()},
            {name: torch.full_like(tensor, float("nan"))},
            {name: tensor, "more": tensor.clone()},
            {name: tensor.to(torch.int8)},
        ]
        state |= replaced[how]

    return of_weights(change)


DAMAGES = st.one_of(
    _json_damage(),
    _byte_damage(),
    _tensor_damage(),
    st.sampled_from(sorted(BROKEN)).map(lambda name: BROKEN[name][0]),
)
COMMANDS = (
    ["doctor", "-c", "config.yaml"],
    ["run", "-c", "config.yaml", "--quiet", "--out", "out", "--force"],
    ["run", "-c", "config.yaml", "--stream", "--quiet", "--out", "out", "--force"],
    ["compare", "--baseline", str(DEMO / "checkpoint"), "--subject", "damaged", "--weights-only", "--quiet", "--out", "out",
     "--force", "--set", "guards.order=[invariants]"],
)  # fmt: skip


@settings(max_examples=examples(1_000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGES, command=st.sampled_from(COMMANDS))
def test_a_damaged_checkpoint_is_judged_or_refused(damage: Damage, command: list[str], invarlock, config) -> None:
    for folder in ("damaged", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEMO / "checkpoint", "damaged")
    damage(Path("damaged"))
    dataset = {"provider": "demo", "seq_len": 16, "preview_n": 1, "final_n": 2}
    config(model={"id": "damaged"}, dataset=dataset)
    done = invarlock(*command)
    assert done.code in (0, 1, 2), done.err
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if not line.startswith("invarlock: warning: ")]
    assert len(errors) == (done.code == 2), done.err
    if done.code == 2:
        assert errors[0].startswith("invarlock: error: ")
