"""The example: a guard that reads one number from the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.api import Guard


class HelloGuard(Guard):
    """Passes while ``context["hello_score"]`` (0 when absent) is at most the threshold."""

    name = "hello_guard"

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = threshold

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        score = float(context.get("hello_score", 0.0))
        passed = score <= self.threshold
        return {
            "passed": passed,
            "action": "continue" if passed else "warn",
            "message": f"hello_score {score:g} {'within' if passed else 'above'} threshold {self.threshold:g}",
            "metrics": {"hello_score": score, "threshold": self.threshold},
        }
