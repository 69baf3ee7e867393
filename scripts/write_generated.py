"""Write what is made from the code: docs/hooks.md, docs/configuration.md and the JSON Schema of the report.

python scripts/write_generated.py           writes them anew
python scripts/write_generated.py --check   exit status 1 if one is not current
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from invarlock import hookspecs
from invarlock.config.schema import keys
from invarlock.plugins.checking import HOOKS
from invarlock.reporting.report import make_json_schema

ROOT = Path(__file__).resolve().parent.parent


def hooks_page() -> str:
    """Every hook with its exact signature and its docstring, and what the module says of them all."""
    return "\n".join(["# Hooks", "", _prose(inspect.getdoc(hookspecs) or ""), "", *_hook_sections()])


def _hook_sections() -> Iterator[str]:
    for name in HOOKS:
        spec = getattr(hookspecs, name)
        arguments = ", ".join(inspect.signature(spec).parameters)
        yield f"## `{name}({arguments})`\n\n{_prose(inspect.getdoc(spec) or '')}\n"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: fields become lists, ``code`` becomes `code`, indented examples become blocks."""
    lines, in_code = [], False
    for line in docstring.splitlines():
        code = line.startswith("    ") and (in_code or (bool(lines) and lines[-1] == ""))
        if in_code and line.strip() and not line.startswith("    "):
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
            in_code = False
        if code and not in_code:
            lines.append("```python")
            in_code = True
        if in_code:
            lines.append(line.removeprefix("    "))
        else:
            lines.append(_field(line).replace("``", "`").replace("::", ":"))
    return "\n".join([*lines, "```"] if in_code else lines)


def _field(line: str) -> str:
    for start, shown in ((":param ", "- "), (":returns:", "- returns:")):
        if line.startswith(start):
            name, _, rest = line.removeprefix(start).partition(": ")
            return f"- `{name}`: {rest}" if start == ":param " else shown + line.removeprefix(start)
    return f"  {line.strip()}" if line.startswith("    ") else line


def configuration_page() -> str:
    """A table a section."""
    lines = [
        "# Configuration",
        "",
        "A YAML file; all sections but `model` are optional. `--set KEY=VALUE` goes before the file,",
        "the file before the defaults. An unknown key is an error that names it, its line and the nearest known one.",
        "`invarlock config --schema` prints a JSON Schema for editors.",
    ]
    section = None
    for key in keys():
        if key.path.split(".")[0] != section:
            section = key.path.split(".")[0]
            lines += ["", f"## {section}", "", "| key | type | default | |", "|---|---|---|---|"]
        kind = key.type.replace("|", "\\|")
        lines.append(f"| `{key.path}` | {kind} | {key.default} | {key.sentence} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    files = {
        "docs/hooks.md": hooks_page(),
        "docs/configuration.md": configuration_page(),
        "invarlock/reporting/report-v1.schema.json": json.dumps(make_json_schema(), indent=2) + "\n",
    }
    stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    if "--check" in sys.argv:
        for name in stale:
            print(f"{name} is not current: python scripts/write_generated.py")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(files[name])
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
