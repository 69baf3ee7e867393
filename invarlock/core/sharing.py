"""The import path that ``docs/compatibility.md`` promises: ``from invarlock.core.sharing import each``."""

from __future__ import annotations

from invarlock.distributed.parallel_map import each

__all__ = ["each"]
