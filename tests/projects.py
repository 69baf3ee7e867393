"""How the tests install a project without an installer."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path


def lay_editable(project: Path, site: Path) -> Path:
    """Put a project's sources on the path, and what its metadata say into ``site``, as an editable install does.

    :returns: the project's folder, absolute.
    """
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in about["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    sys.path.insert(0, str(project.resolve() / "src"))
    importlib.invalidate_caches()
    return project.resolve()
