"""The man pages, the same on every machine and every day, so that an installation leaves the checkout as it was."""

from __future__ import annotations

import os

from build_manpages import build_manpages

SAME_EVERYWHERE = {"SOURCE_DATE_EPOCH": "0", "TZ": "UTC", "COLUMNS": "80"}


class BuildManPages(build_manpages):  # type: ignore[misc]
    """The command ``build_manpages`` of setuptools."""

    def run(self) -> None:
        os.environ |= SAME_EVERYWHERE
        super().run()
