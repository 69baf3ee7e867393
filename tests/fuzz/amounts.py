"""How many examples a generator of inputs makes: all of them with ``tox -e fuzz``, a small share in the suite."""

from __future__ import annotations

import os

SHARE = 250


def examples(whole: int) -> int:
    """:param whole: how many ``tox -e fuzz`` makes."""
    return whole if os.environ.get("INVARLOCK_FUZZ") == "1" else max(1, whole // SHARE)
