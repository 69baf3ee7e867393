"""Every example in the documentation runs as it is printed, and the site that is made of it is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from command_lines import JUDGED, lay_out, perform
from conftest import Done, slow
from markdown_it import MarkdownIt

from invarlock.config.loading import load

ROOT = Path(__file__).parent.parent
# tests/test_hooks.py runs the plugins of docs/hooks.md.
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
    if path.name not in ("hooks.md", "judgement.md")
]
OF_BENCHMARKS = slow("docs/judgement.md")

NOT_RUN = {
    r"pip (install|download)": "brings packages; .ci/run installs from these lines",
    r"^(torchrun|srun|mpirun|salloc) ": "several processes; tests/test_ranks.py starts them",
    r"^python benchmarks/": "takes minutes; its figures are on the page",
    r"^bible |smollm2\.yaml": "a real model and a Debian package; tests/test_real.py downloads the model",
}
"""Lines that are not run, by what they look like, each with the reason."""


@dataclass(frozen=True)
class Block:
    """An example: its language, its text, and the words just above it."""

    language: str
    text: str
    above: str

    @property
    def commands(self) -> list[str]:
        """Of a console what stands after the prompt, of a script each line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]

    @property
    def file(self) -> str | None:
        """The name of the file to put it into, from its first line or the words above."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text) or re.search(r"`([\w./-]+\.\w+)`[^`]*:$", self.above)
        return named[1] if named else None


def blocks(page: str) -> Iterator[Block]:
    above = ""
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type == "inline":
            above = token.content
        elif token.type in ("fence", "code_block"):
            yield Block(token.info.strip() or ("sh" if token.type == "code_block" else ""), token.content, above)


def not_run(command: str) -> list[str]:
    return [pattern for pattern in NOT_RUN if re.search(pattern, command)]


def run_commands(block: Block, run: Callable[[str], Done]) -> None:
    for command in block.commands:
        if not not_run(command):
            lay_out(command)
            done = run(command)
            assert done.code in JUDGED, f"{command}: {done.err}"
            # Without this, a wrong guard would pass as a rejection.
            assert "Traceback" not in done.err, f"{command}: {done.err}"


def check_yaml(block: Block) -> None:
    """A configuration is loaded as a run would load it; other YAML has to be YAML."""
    if "model" in yaml.safe_load(block.text):
        path = Path(block.file or "block.yaml")
        path.write_text(block.text)
        config = load(str(path))
        lay_out(f"{config.model.id} {config.dataset.path or ''}")


@pytest.mark.parametrize("page", [*PAGES, *OF_BENCHMARKS])
def test_the_examples_of_a_page_run_from_top_to_bottom(page: str, invarlock, module, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path))
    for number, block in enumerate(blocks(page)):
        match block.language:
            case "python":
                name = block.file or f"block{number}_of_{Path(page).stem}.py"
                module(name.removesuffix(".py"), block.text)
                exec(compile(block.text, name, "exec"), {"__name__": name})
            case "console" | "sh" | "bash" | "shell":
                run_commands(block, lambda command: perform(command, invarlock))
            case "yaml":
                check_yaml(block)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case language:
                assert language == "text", f"{page}: a block has no language that the tests know: {block.text}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_among_the_examples_loads(path: Path) -> None:
    assert load(str(path)).model.id


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_still_there(pattern: str) -> None:
    commands = [
        command for page in [*PAGES, "docs/judgement.md"] for block in blocks(page) for command in block.commands
    ]
    assert any(re.search(pattern, command) for command in commands), f"remove {pattern!r} from NOT_RUN"


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a page that is not in the navigation or a link that leads nowhere ends it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_on_the_site_and_in_its_navigation(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        assert f": {path}\n" in navigation, f"{path} is missing in mkdocs.yml"
        page = site / path.removesuffix(".md").removesuffix("README") / "index.html"
        assert page.exists(), page


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:)?//", page.read_text())
        assert not loaded, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_links_out_of_docs_work_on_the_site(site: Path) -> None:
    page = site / "docs" / "compatibility" / "index.html"
    (link,) = re.findall(r'<a href="([^"]+)">README</a>', page.read_text())
    target = (page.parent / link).resolve()
    assert (target / "index.html" if target.is_dir() else target) == site / "index.html"
