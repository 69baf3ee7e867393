"""What the documentation site is made of; MkDocs calls this by the name in mkdocs.yml.

Pages keep their paths in the repository, so that a link that works there works on the site.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "examples/**/*.md")
LINKED = ("LICENSE", "constraints.txt", "examples/**/*.yaml")
"""Files that pages link to; they are copied as they are."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what lies in ``docs_dir`` alone; what the theme and plugins bring stays."""
    brought = [file for file in files if file.src_dir != config.docs_dir]
    ours = [path for pattern in (*PAGES, *LINKED) for path in sorted(ROOT.glob(pattern))]
    return Files([*brought, *(_file(path, config) for path in ours)])


def _file(path: Path, config: MkDocsConfig) -> File:
    return File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
