"""Which package imports which, and what start-up imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from invarlock import api

ROOT = Path(__file__).parent.parent
LAYERS = {
    "core": set(),
    "hookspecs": set(),
    "distributed": {"core"},
    "models": {"core", "distributed"},
    "search": {"core", "models", "quantization", "datasets", "evaluation"},
    # Section edit.plan is the plan, and output.format has the names of formats.
    "config": {"core", "quantization", "exporters"},
    "quantization": {"core", "distributed", "models"},
    "datasets": {"core", "models"},
    "evaluation": {"core", "distributed", "models", "datasets"},
    "checkpoints": {"core", "distributed", "models"},
    # Codes and scales of a scheme, to the side first.
    "exporters": {"core", "models", "quantization", "checkpoints"},
    # The report holds the results as they are.
    "reporting": {"core", "evaluation"},
    # An adapter's snapshot is the files that a model came from.
    "plugins": {"core", "distributed", "models", "hookspecs", "checkpoints"},
    # A new package is written to the side and renamed, as checkpoints are.
    "scaffold": {"core", "plugins", "checkpoints"},
}
JUDGING = {*LAYERS, "pipeline"} - {"scaffold"}
LAYERS |= {
    "pipeline": JUDGING - {"pipeline"},
    "evidence": JUDGING - {"exporters"},
    "doctor": JUDGING - {"reporting"},
    "cli": {"core", "config", "distributed", "plugins", "pipeline", "reporting", "checkpoints", "evidence", "doctor", "scaffold"},
    # For authors: it drives what a user drives, and nothing else imports it.
    "testing": {*JUDGING, "cli"},
    # What plugins import, from wherever it is.
    "api": JUDGING,
    "adapters": set(),
    "__main__": {"cli"},
}  # fmt: skip
PROMISED = {"core/api.py", "core/sharing.py"}
"""Import paths that ``docs/compatibility.md`` promises, of what lives elsewhere."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("invarlock"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "invarlock").parts[0].removesuffix(".py")
    if part == "__init__" or str(path.relative_to(ROOT / "invarlock")) in PROMISED:
        return
    allowed = LAYERS[part] | {part}
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "invarlock" and rest:
            assert rest.split(".")[0] in allowed, f"{path.name} imports {name}"
        if part != "adapters":
            assert top != "plugins_builtin", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules("plugins_builtin"), ids=lambda path: str(path.relative_to(ROOT)))
def test_built_ins_import_only_what_a_third_party_could(path: Path) -> None:
    names = {name for name in imports(path) if name.split(".")[0] == "invarlock"}
    assert names <= {"invarlock.api"}


def test_each_name_for_plugins_is_there_when_it_is_asked_for() -> None:
    declared = {
        alias.name: node.module
        for node in ast.walk(ast.parse(Path(api.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "__future__" and node.module.startswith("invarlock")
        for alias in node.names
    }
    assert declared == {name: home for home, names in api._HOMES.items() for name in names}
    for name, home in declared.items():
        assert getattr(api, name) is getattr(import_module(home), name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins", "list", "--json"],
        ["run", "--help"],
        ["verify", "--help"],
        ["report", "--help"],
        ["doctor", "--help"],
    ],
)
def test_start_up_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from invarlock.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pydantic', 'numpy', 'rich', 'jinja2', 'shtab') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]"), done.stderr


@pytest.mark.parametrize(
    "names", ["api import Guard, ModelAdapter", "reporting import reading", "evaluation import results"]
)
def test_the_class_form_and_a_report_import_no_torch(names: str) -> None:
    code = f"import sys; from invarlock.{names}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count, too."""
    paths = {module_name(path): path for package in ("invarlock", "plugins_builtin") for path in modules(package)}
    known = {name: {*imports(path), *members(path)} & paths.keys() for name, path in paths.items()}
    TopologicalSorter(known).prepare()


def members(path: Path) -> Iterator[str]:
    """Names imported from a package, which may be modules of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
