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

READING = """\
## How a file is read

Scalars are those of YAML 1.2: `1e-3` is a number, `2024-01-01` is text. What readers of YAML disagree about has to be
quoted or written out: `no`, `on`, `010`, `1:30`, `1_000`. Numbers are finite and have at most 18 digits. Aliases and
`<<` are expanded, up to a million values and characters in all; what is written out goes before what is merged. Keys at
the top that begin with `x-` are free for anchors:

```yaml
x-plan: &plan {bitwidth: 4, group_size: 64}
model:  {id: "${MODELS}/checkpoint"}
edit:   {plan: {<<: *plan, scope: all}}
```

## Paths

One rule for `model.id`, `dataset.path`, `output.dir` and every option that takes a path: `~` and `${NAME}` are
expanded, and a variable that is not set is an error; nothing else of a shell is. A relative path is below the working
directory, not beside the file. What is not there is reported by its absolute path. An empty path, a named pipe, a
device and a name that is not UTF-8 are refused. `model.id` is an id on a hub where it looks like one, `name` or
`owner/name`, and nothing of that name is there; `./owner/name` is always a path."""

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
    """A docstring as Markdown: fields become lists, ``code`` becomes `code`, indented examples become whole plugins."""
    lines, in_code = [], False
    for line in docstring.splitlines():
        code = line.startswith("    ") and (in_code or (bool(lines) and lines[-1] == ""))
        if in_code and line.strip() and not line.startswith("    "):
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
            in_code = False
        if code and not in_code:
            lines += ["```python", "from invarlock import hookimpl", *_blank_unless_import(line)]
            in_code = True
        if in_code:
            lines.append(line.removeprefix("    "))
        else:
            lines.append(_field(line).replace("``", "`").replace("::", ":"))
    return "\n".join([*lines, "```"] if in_code else lines)


def _blank_unless_import(line: str) -> list[str]:
    """The line between the imports of an example and its code, where the example imports nothing else."""
    return [] if line.strip().startswith(("from ", "import ")) else [""]


def _field(line: str) -> str:
    if line.startswith(":param "):
        name, _, rest = line.removeprefix(":param ").partition(": ")
        return f"- `{name}`: {rest}"
    if line.startswith((":called:", ":returns:", ":raises:")):
        return f"- {line.removeprefix(':')}"
    return f"  {line.strip()}" if line.startswith("    ") else line


def configuration_page() -> str:
    """A table a section."""
    lines = [
        "# Configuration",
        "",
        "A YAML file; all sections but `model` are optional. `--set KEY=VALUE` goes before the file,",
        "the file before the defaults. An unknown key is an error that names it, its line and the nearest known one.",
        "`invarlock config --schema` prints a JSON Schema for editors.",
        "",
        *READING.splitlines(),
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
