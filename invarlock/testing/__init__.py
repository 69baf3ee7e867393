"""Tools to test plugins with: tiny models, named damage, the real pipeline, an isolated command line.

from invarlock.testing import check_guard, damage, run_guard, tiny_model

The fixture ``invarlocker`` is there in every test: pytest loads ``invarlock.testing.plugin`` by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invarlock.testing.architectures import ARCHITECTURES, tiny_model
    from invarlock.testing.checking import check_guard
    from invarlock.testing.invarlocker import Done, Invarlocker
    from invarlock.testing.named_edits import Edit, damage, edits
    from invarlock.testing.running import run_guard

_MODULES = {
    "architectures": ("ARCHITECTURES", "tiny_model"),
    "checking": ("check_guard",),
    "invarlocker": ("Done", "Invarlocker"),
    "named_edits": ("Edit", "damage", "edits"),
    "running": ("run_guard",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["ARCHITECTURES", "Done", "Edit", "Invarlocker", "check_guard", "damage", "edits", "run_guard", "tiny_model"]


def __getattr__(name: str) -> Any:
    # Only on demand: pytest imports this package in every project where InvarLock is installed.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
