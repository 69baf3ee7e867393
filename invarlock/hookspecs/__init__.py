"""Every hook of InvarLock: when it is called, its arguments and its result.

A plugin implements any of these with ``@invarlock.hookimpl``, on functions of a module or methods of an object, and may
take any subset of a hook's arguments, by name. An implementation with ``wrapper=True`` runs around the others: it takes
the same arguments, yields once, gets the result from the yield and returns it. A wrapper that fails, does not yield or
loses the result is named and ends with exit code 3; what it wraps keeps its result.

Unless a hook states otherwise: a ``model`` must not be changed; ``adapter`` is the one that loaded it, an object with
the methods of ``ModelAdapter``; ``policy`` holds the guard's options, as in the configuration; a ``report`` is a copy
of plain values, as ``report.json`` holds them, and changes of it are lost. Implementations are called from the last
registered to the first, plugins before built-ins, ``trylast`` last: all of them, or until one returns a result. When
one raises, its plugin is named, the baseline restored, nothing saved; exit code 3, or 2 for a ``UsageError``.

Each example, with ``from invarlock import hookimpl`` above it, is a whole plugin: put into a file ``mine.py``, it works
with ``-p mine``. A guard is run if it stands in ``guards.order``, an adapter if ``model.adapter`` names it or, with
``auto``, if it owns ``model.id``. A guard that counts the weights that a model has lost::

    @hookimpl
    def invarlock_validate(model):
        zeros = sum((p == 0).sum().item() for p in model.parameters())
        return {"passed": zeros == 0, "action": "warn" if zeros else "continue", "metrics": {"zeros": zeros}}
"""

from __future__ import annotations

# The order is that of the documentation.
# ruff: noqa: I001
from invarlock.hookspecs.marker import hookspec as hookspec
from invarlock.hookspecs.models import invarlock_load_model as invarlock_load_model
from invarlock.hookspecs.models import invarlock_load_tokenizer as invarlock_load_tokenizer
from invarlock.hookspecs.models import invarlock_describe as invarlock_describe
from invarlock.hookspecs.models import invarlock_snapshot as invarlock_snapshot
from invarlock.hookspecs.models import invarlock_restore as invarlock_restore
from invarlock.hookspecs.guards import invarlock_observe as invarlock_observe
from invarlock.hookspecs.guards import invarlock_prepare as invarlock_prepare
from invarlock.hookspecs.guards import invarlock_validate as invarlock_validate
from invarlock.hookspecs.runs import invarlock_documents as invarlock_documents
from invarlock.hookspecs.runs import invarlock_tasks as invarlock_tasks
from invarlock.hookspecs.runs import invarlock_exporters as invarlock_exporters
from invarlock.hookspecs.runs import invarlock_report_formats as invarlock_report_formats
from invarlock.hookspecs.runs import invarlock_add_commands as invarlock_add_commands
from invarlock.hookspecs.runs import invarlock_attempt_finished as invarlock_attempt_finished
from invarlock.hookspecs.runs import invarlock_run_finished as invarlock_run_finished
from invarlock.hookspecs.runs import invarlock_report_sections as invarlock_report_sections
