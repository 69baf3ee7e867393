"""What docs/compatibility.md promises is there, and a deprecation reads as it says."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from invarlock import hookspecs
from invarlock.core.errors import ExitCode
from invarlock.plugins.plugin import GROUPS

PAGE = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
GROUP_NAMES = set(GROUPS.values())
PROMISED = sorted(set(re.findall(r"`(invarlock(?:\.\w+)+)`", PAGE)) - GROUP_NAMES | {"invarlock.adapters"})


def resolved(path: str) -> Any:
    """The module, or the attribute of one, that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(importlib.import_module(owner), name)


@pytest.mark.parametrize("path", PROMISED)
def test_a_promised_name_is_there(path: str) -> None:
    assert resolved(path) is not None


def test_the_page_names_what_it_promises() -> None:
    assert {"invarlock.hookimpl", "invarlock.core.api.Guard", "invarlock.core.api.ModelAdapter"} <= set(PROMISED)
    for group in GROUP_NAMES:
        assert f"`{group}`" in PAGE
    for code in ExitCode:
        assert re.search(rf"\b{code.value}\b", PAGE)


PLUGIN = """\
from invarlock import hookimpl


@hookimpl
def invarlock_run_finished(report):
    report["extra"]["told"] = True
"""


@pytest.fixture
def deprecated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec that the page prints, in the place of the real one."""
    namespace: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], namespace)
    monkeypatch.setattr(hookspecs, "invarlock_run_finished", namespace["invarlock_run_finished"])


def test_a_deprecated_argument_warns_at_the_plugins_own_line(invarlock, module, deprecated) -> None:
    module("my_plugin", PLUGIN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = invarlock("plugins", "-p", "my_plugin")
    assert done.code == 0, done.err
    (warning,) = (entry for entry in caught if entry.filename.endswith("my_plugin.py"))
    said = f"{Path(warning.filename).name}:{warning.lineno}: {warning.category.__name__}: {warning.message}"
    assert said in PAGE


def test_a_plugin_that_takes_the_new_argument_is_not_told(invarlock, module, deprecated) -> None:
    module("my_plugin", PLUGIN.replace("(report)", "(summary)").replace('report["extra"]["told"] = True', "pass"))
    assert invarlock("plugins", "-p", "my_plugin").code == 0
