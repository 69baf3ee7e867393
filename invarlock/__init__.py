"""InvarLock: did this edit break the model, and may it ship?"""

from __future__ import annotations

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("invarlock")
"""Marks a function as the implementation of a hook of ``invarlock.hookspecs``."""

__all__ = ["__version__", "hookimpl"]
