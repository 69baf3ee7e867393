"""The import path of the user guide: ``from invarlock.adapters import HF_Causal_Adapter``.

An alias of the built-in adapters; the classes are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugins_builtin.adapters.hf import HF_Auto_Adapter, HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter

__all__ = ["HF_Auto_Adapter", "HF_Causal_Adapter", "HF_MLM_Adapter", "HF_Seq2Seq_Adapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from plugins_builtin.adapters import hf

    return getattr(hf, name)
