"""The pytest plugin. It is loaded in every project where InvarLock is installed, so it imports nothing of it yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from invarlock.testing.invarlocker import Invarlocker


@pytest.fixture
def invarlocker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invarlocker]:
    """An isolated command line of InvarLock: a working folder of its own, local plugins, no settings of the user."""
    from invarlock.testing.invarlocker import Invarlocker

    with Invarlocker.isolated(tmp_path, monkeypatch) as command_line:
        yield command_line
