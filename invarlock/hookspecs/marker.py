"""The marker of a hook's specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("invarlock")
Options = Mapping[str, Any]
