"""The man pages, the same on every machine and every day, so that an installation leaves the checkout as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from build_manpages import build_manpages, install

SAME_EVERYWHERE = {"SOURCE_DATE_EPOCH": "0", "TZ": "UTC", "COLUMNS": "80"}


class BuildManPages(build_manpages):  # type: ignore[misc]
    """The command ``build_manpages`` of setuptools: a page for each built-in command, and one for them all."""

    def finalize_options(self) -> None:
        # Commands are found through their entry points, which this writes.
        self.run_command("egg_info")
        from invarlock.cli.manpages import command_names, include_of

        pages = ["man/invarlock.1:function=main_parser:include=man/include/invarlock.man"]
        for name in command_names():
            include = f":include={path}" if (path := include_of(name)) else ""
            pages.append(f"man/invarlock-{name}.1:function={name}_parser{include}")
        common = ":module=invarlock.cli.manpages:manual_title=InvarLock manual"
        self.manpages = "\n".join(page + common for page in pages)
        super().finalize_options()

    def run(self) -> None:
        os.environ |= SAME_EVERYWHERE
        super().run()


class Install(install):  # type: ignore[misc]
    """The command ``install`` of setuptools, man pages included."""

    def install_manual_pages(self) -> None:
        folder = Path(self.install_data, "share", "man", "man1")
        folder.mkdir(parents=True, exist_ok=True)
        for page in Path("man").glob("*.1"):
            shutil.copy(page, folder)
