"""The guard ``output_range``: no block may say much larger things than before."""

from collections.abc import Mapping
from typing import Any

from invarlock.core.api import Guard


class OutputRangeGuard(Guard):
    """Compares the largest output of each block, before the edit and after it, on the preview windows.

    Rolls back where one is not finite any more or more than ``max_growth`` times the baseline's; warns from
    ``warn_growth`` on.
    """

    name = "output_range"

    def __init__(self, max_growth: float = 4.0, warn_growth: float = 1.5):
        """
        :param max_growth: how many times the baseline's largest output a block's may be.
        :param warn_growth: from how many times on it is said.
        """
        self.max_growth = max_growth
        self.warn_growth = warn_growth

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        return {name: LargestOutput() for name in block_names(model)}

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        before, after = context["observations"]["baseline"], context["observations"]["edited"]
        if not before or not after:
            return {
                "passed": False,
                "action": "continue",
                "message": "not measured: there were no windows",
                "metrics": {"measured": False},
            }
        # "not within" rather than "beyond": NaN is neither.
        broken = [name for name in after if not after[name] <= self.max_growth * before[name]]
        grown = [name for name in after if name not in broken and after[name] > self.warn_growth * before[name]]
        suspects = [{"module": name, "evidence": f"{before[name]:.3g} -> {after[name]:.3g}"} for name in broken + grown]
        return {
            "passed": not broken,
            "action": "rollback" if broken else "warn" if grown else "continue",
            "message": f"{len(broken)} of {len(after)} blocks beyond {self.max_growth:g} times their largest output",
            "warnings": [f"the largest output of {name} grew" for name in grown],
            "metrics": {"suspects": suspects},
        }


class LargestOutput:
    """A tap: the largest absolute value that a module gave."""

    def __init__(self):
        self.largest = 0.0

    def __call__(self, module, args, kwargs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        # The tensor's maximum, unlike Python's, keeps NaN.
        self.largest = hidden.abs().max().maximum(hidden.new_tensor(self.largest)).item()

    def result(self):
        return self.largest


def block_names(model: Any) -> list[str]:
    """The elements of the outermost module lists: the layers of a transformer."""
    from torch import nn

    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{place}" for name in outermost for place in range(len(model.get_submodule(name)))]
