"""Which package imports which, and what start-up imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "core": set(),
    "hookspecs": set(),
    "config": {"core"},
    "quantization": {"core"},
    "evaluation": {"core"},
    # Exports store the codes and scales of a scheme.
    "checkpoints": {"core", "quantization"},
    "reporting": {"core"},
    "plugins": {"core", "hookspecs"},
    "pipeline": {"core", "config", "quantization", "evaluation", "checkpoints", "reporting", "plugins"},
    # A new package is written to the side and renamed, as checkpoints are.
    "scaffold": {"core", "plugins", "checkpoints"},
    "evidence": {"core", "config", "quantization", "evaluation", "checkpoints", "reporting", "plugins", "pipeline"},
    "doctor": {"core", "config", "quantization", "evaluation", "checkpoints", "plugins", "pipeline"},
    "cli": {"core", "config", "plugins", "pipeline", "reporting", "checkpoints", "evidence", "doctor", "scaffold"},
    # For authors: it drives what a user drives, and nothing else imports it.
    "testing": {"core", "config", "quantization", "evaluation", "pipeline", "plugins", "cli"},
    "adapters": set(),
    "__main__": {"cli"},
}


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
    if part == "__init__":
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
    for name in imports(path):
        if name.startswith("invarlock."):
            assert name.split(".")[1] in ("core", "evaluation", "quantization", "checkpoints"), (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins", "list", "--json"],
        ["run", "--help"],
        ["verify", "--help"],
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


def test_the_class_form_imports_no_torch() -> None:
    code = "import sys; from invarlock.core.api import Guard, ModelAdapter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
