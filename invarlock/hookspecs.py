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

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("invarlock")
Options = Mapping[str, Any]


# -- a model: the adapter that loads it is asked for all the rest ------------------------------------------------------
@hookspec(firstresult=True)
def invarlock_load_model(model_id: str, device: str, options: Options) -> Any:
    """Load a model.

    :called: once per run: on the adapter that ``model.adapter`` names, with ``auto`` on one after the other.
    :param model_id: ``model.id`` of the configuration: a path or an id on a hub.
    :param device: ``model.device``: "auto", "cpu", "cuda", "cuda:1", "mps".
    :param options: ``dtype``, ``trust_remote_code``, ``revision``, and ``stream``: true where weights stay on disk.
    :returns: a ``torch.nn.Module``, or None for an id that is not the adapter's. Stops at the first non-None result.
    :raises: an adapter asked for by name ends the run (exit code 3, or 2 for a ``UsageError`` or an ``OSError``); with
        ``auto`` a ``UsageError`` ends it too, and any other exception is logged and the next adapter asked.

    Example, an adapter for ids such as ``folder:path/to/checkpoint``::

        @hookimpl
        def invarlock_load_model(model_id):
            from transformers import AutoModelForCausalLM

            owned = model_id.startswith("folder:")
            return AutoModelForCausalLM.from_pretrained(model_id.removeprefix("folder:")) if owned else None
    """


@hookspec(firstresult=True)
def invarlock_load_tokenizer(model_id: str, options: Options) -> Any:
    """Load the model's own tokenizer.

    :called: once per run, or per checkpoint of a comparison, if text has to become windows or the model is to be saved.
    :param model_id: ``model.id``.
    :param options: ``trust_remote_code`` and ``revision``.
    :returns: a tokenizer like those of transformers; None: use ``AutoTokenizer``. Stops at the first non-None result.
    :raises: the run ends before anything is measured.

    Example, an adapter whose tokenizer lies in a folder of its own::

        from transformers import AutoModelForCausalLM, AutoTokenizer

        @hookimpl
        def invarlock_load_model(model_id):
            return AutoModelForCausalLM.from_pretrained(model_id)

        @hookimpl
        def invarlock_load_tokenizer(model_id):
            return AutoTokenizer.from_pretrained(f"{model_id}/tokenizer")
    """


@hookspec(firstresult=True)
def invarlock_describe(model: Any) -> dict[str, Any] | None:
    """Describe the model for guards and the report.

    :called: once, after loading.
    :param model: the loaded model.
    :returns: a dict of plain values: model_type, model_class, n_layer, n_head, ...; None: use the default, which reads
        the model's ``config``. Stops at the first non-None result.
    :raises: the run ends before anything is measured.

    Example, a wrapper that adds to the description of any adapter::

        @hookimpl(wrapper=True)
        def invarlock_describe(model):
            described = yield
            return {**described, "megabytes": sum(p.nbytes for p in model.parameters()) / 1e6}
    """


@hookspec(firstresult=True)
def invarlock_snapshot(model: Any) -> Any:
    """Keep all that is needed to restore the model bit for bit.

    :called: once per run, before the first guard sees the model.
    :param model: the baseline.
    :returns: anything; it is handed to ``invarlock_restore`` as it is. None: let the default do both, with a temporary
        folder of tensors. Stops at the first non-None result.
    :raises: the run ends before the edit.

    Example, an adapter that keeps the baseline in memory::

        from transformers import AutoModelForCausalLM

        @hookimpl
        def invarlock_load_model(model_id):
            return AutoModelForCausalLM.from_pretrained(model_id)

        @hookimpl
        def invarlock_snapshot(model):
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

        @hookimpl
        def invarlock_restore(model, snapshot):
            model.load_state_dict(snapshot)
            return True
    """


@hookspec(firstresult=True)
def invarlock_restore(model: Any, snapshot: Any) -> Any:
    """Restore the model to its state at ``invarlock_snapshot``.

    :called: after a rollback, an abort, an exception or Ctrl-C, and to undo what a guard changed. The pipeline compares
        fingerprints afterwards: a baseline that is not restored bit for bit is an error of the adapter.
    :param model: the model to restore, in place.
    :param snapshot: the result of ``invarlock_snapshot``.
    :returns: True when it was restored; None: use the default. Stops at the first non-None result.
    :raises: the run ends.

    Example, a wrapper that reports when the baseline is restored::

        import sys

        @hookimpl(wrapper=True)
        def invarlock_restore():
            restored = yield
            print("the baseline is back", file=sys.stderr)
            return restored
    """


# -- judging an edit: each guard in the order of guards.order; a call reaches this guard and every wrapper -------------
@hookspec(firstresult=True)
def invarlock_observe(model: Any, adapter: Any, policy: Options, guard: str) -> Mapping[str, Any] | None:
    """Ask for the inputs and outputs of modules.

    :called: before each of the two forward passes, the baseline's and the edited model's.
    :param model: the model as it will be run.
    :param adapter: the model's adapter.
    :param policy: the guard's options.
    :param guard: the guard's name, for wrappers.
    :returns: a tap for each module name, or None: a callable ``tap(module, args, kwargs, output)`` with a method
        ``result()``, called for the preview windows; it must change nothing. Stops at the first non-None result.
    :raises: an error of that guard, which counts as abort; so is anything but taps by module name.

    Example, a guard that looks at the largest output of each MLP block::

        class Largest(list):
            def __call__(self, module, args, kwargs, output):
                self.append(output.abs().max().item())

            def result(self):
                return max(self)

        @hookimpl
        def invarlock_observe(model):
            return {name: Largest() for name, module in model.named_modules() if name.endswith("mlp")}

        @hookimpl
        def invarlock_validate(context):
            before, after = context["observations"]["baseline"], context["observations"]["edited"]
            grown = [name for name in after if after[name] > 2 * before[name]]
            return {"passed": not grown, "action": "warn" if grown else "continue", "message": f"grown: {grown}"}
    """


@hookspec(firstresult=True)
def invarlock_prepare(model: Any, adapter: Any, calib: Any, policy: Options, guard: str) -> Mapping[str, Any] | None:
    """Look at the baseline.

    :called: before the edit.
    :param model: the baseline. Whatever of it ``invarlock_validate`` needs has to be copied: the edit is in place.
    :param adapter: the model's adapter.
    :param calib: the preview windows: an iterable of batches, dicts of ``input_ids`` and ``attention_mask``.
    :param policy: the guard's options.
    :param guard: the guard's name, for wrappers.
    :returns: a dict with ``ready``, True or False; None counts as ready. Stops at the first non-None result.
    :raises: abort before the edit, once the others are prepared; so for any ``ready`` but True.

    Example, a guard that compares the norm of each parameter with the baseline's::

        norms = {}

        @hookimpl
        def invarlock_prepare(model):
            norms.update({name: p.norm().item() for name, p in model.named_parameters()})
            return {"ready": bool(norms), "largest": max(norms.values())}

        @hookimpl
        def invarlock_validate(model):
            moved = [n for n, p in model.named_parameters() if abs(p.norm().item() - norms[n]) > norms[n] / 100]
            return {"passed": not moved, "action": "warn" if moved else "continue", "message": f"moved: {moved}"}
    """


@hookspec(firstresult=True)
def invarlock_validate(model: Any, adapter: Any, context: Mapping[str, Any], guard: str) -> Mapping[str, Any] | None:
    """Judge the edited model.

    :called: after the edit: on all guards, whatever one of them says, unless ``guards.fail_fast`` is set.
    :param model: the edited model. A change of it, of its modules' hooks and attributes, of its configuration or its
        tokenizer is undone and named, as an error of the guard.
    :param adapter: the model's adapter.
    :param context: ``baseline`` and ``edited`` (what the passes measured), ``edit`` (the plan and what it did to each
        module), ``limit`` (``eval.max_pm_ratio``, the largest ratio of the metric to accept), ``policy``,
        ``observations`` (what taps collected) and ``tokenizers``, of both sides, ``attempt``, ``device``, ``rank``.
    :param guard: the guard's name, for wrappers.
    :returns: a dict: ``passed`` (bool), ``action`` ("continue", "warn", "rollback", "abort"), ``message``, ``metrics``
        (a dict of figures), ``warnings`` (a list of texts). "continue" goes with ``passed`` False only where
        ``metrics["measured"]`` is False, too: then the guard has no opinion. Lists are cut to 10,000 entries, tensors
        of more than 1,000 numbers to their shape, with a warning. Stops at the first non-None result.
    :raises: an error of that guard, which counts as abort, with the traceback in the report; so for a result without
        ``passed``, an unknown or a contradicting action, or ``metrics`` that hold what is no data.

    Example, a timer around every guard::

        import sys, time

        @hookimpl(wrapper=True)
        def invarlock_validate(guard):
            started = time.perf_counter()
            result = yield
            print(f"{guard} took {time.perf_counter() - started:.2f} s", file=sys.stderr)
            return result
    """


# -- a run: its text, its formats, its report, and commands beside it --------------------------------------------------
@hookspec(firstresult=True)
def invarlock_documents(dataset: Any) -> Sequence[str] | None:
    """Give the text that a model is measured on.

    :called: once per run, before a model is loaded, unless ``dataset.provider`` is ``generated``; plugins before
        built-ins. A provider goes by the name of its plugin: other names are neither listed nor suggested for a typo.
    :param dataset: the section ``dataset`` of the configuration: ``provider``, ``path``, ``name``, ``text_field``,
        ``split`` and ``seed`` are for providers to read; it must not be changed.
    :returns: a sequence of texts, which is read no further than needed and in an order of the run's own; None unless
        ``dataset.provider`` is the plugin's. Stops at the first non-None result.
    :raises: the run ends before anything is measured; so for anything but a sequence of texts.

    Example, ``dataset.provider: mine``, which reads each file of the folder ``dataset.path`` as a document::

        from pathlib import Path

        @hookimpl
        def invarlock_documents(dataset):
            if dataset.provider != "mine":
                return None
            return [path.read_text() for path in sorted(Path(dataset.path).glob("*.txt"))]
    """


@hookspec
def invarlock_exporters() -> Sequence[Any] | None:
    """Add formats in which an accepted model can be saved.

    :called: by ``invarlock plugins``, and before a run: so import what is slow to import when the model is saved.
    :returns: exporters, of classes with ``invarlock.api.Exporter`` as base; ``name`` is a value of ``output.format``.
    :raises: nothing is run; so for a name that is taken, or anything but a list of objects with a ``name``.

    Example, a format of one file::

        from invarlock.api import Exporter

        class StateDict(Exporter):
            name, streams = "state-dict", False

            def finish(self, folder, saved):
                import torch
                torch.save(saved.model.state_dict(), folder / "model.pt")

        @hookimpl
        def invarlock_exporters():
            return [StateDict()]
    """


@hookspec
def invarlock_report_formats() -> Sequence[Any] | None:
    """Add formats in which a report can be shown.

    :called: by ``invarlock report`` and ``invarlock plugins``: so import what is slow to import in ``render``.
    :returns: objects with ``name``, for ``invarlock report --format``, ``suffix`` of such files, and ``render``, which
        makes a text of one report or several.
    :raises: nothing is shown; so for a name that is taken, or anything but a list of objects with a ``name``.

    Example, the verdict in one word::

        class Word:
            name, suffix = "word", ".txt"

            def render(self, runs):
                return " ".join(run.report.verdict.action for run in runs)

        @hookimpl
        def invarlock_report_formats():
            return [Word()]
    """


@hookspec
def invarlock_add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add commands to ``invarlock``.

    :called: when the parser is built, on plugins in the form of a module or an object: a class has no instance yet. The
        built-in commands are there before, and keep their names.
    :param subparsers: add a parser to it, with ``set_defaults(run=run)``: ``run(args)`` returns an exit code.
    :returns: nothing.
    :raises: the plugin is named, and the commands of the others are there all the same.

    Example, the command ``invarlock -p mine hello``::

        @hookimpl
        def invarlock_add_commands(subparsers):
            subparsers.add_parser("hello", help="say hello").set_defaults(run=lambda args: print("hello") or 0)
    """


@hookspec
def invarlock_attempt_finished(attempt: int, report: dict[str, Any]) -> None:
    """Look at one attempt of the edit, as soon as its verdict is known.

    :called: by the first process for each attempt of a run, and once in a comparison: after the verdict, before a
        rejected edit is undone and the next attempt begins. An abort because a guard was not ready is an attempt, too.
    :param attempt: its number, counted from 1.
    :param report: ``bitwidth``, ``modules`` (effects on weights), ``guards``, ``metrics``, ``coverage``, ``verdict``.
    :returns: nothing.
    :raises: no further attempt is made.

    Example, a line for each attempt::

        @hookimpl
        def invarlock_attempt_finished(attempt, report):
            with open("attempts.txt", "a") as log:
                print(attempt, report["verdict"]["action"], file=log)
    """


@hookspec
def invarlock_run_finished(report: dict[str, Any]) -> dict[str, Any] | None:
    """Look at the report of a run, and add to it.

    :called: once per run, before the report is written. The model was judged by then: a change of it, of its
        configuration or of its tokenizer ends the run with exit code 3, and nothing is saved.
    :param report: keys that are put below ``report["extra"]`` are taken over; no other change is.
    :returns: a dict of plain values that go below ``extra``, or None.
    :raises: nothing is written.

    Example, the number of a ticket::

        import os

        @hookimpl
        def invarlock_run_finished():
            return {"ticket": os.environ.get("TICKET")}
    """


@hookspec
def invarlock_report_sections(report: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Add sections to the report, which every rendering of it shows.

    :called: once per run, after ``invarlock_run_finished`` and before anything is written. The sections are kept in
        ``report["sections"]``, so that ``invarlock report`` shows them later without the plugin.
    :param report: the whole report, to be read.
    :returns: a list of sections, or None: dicts of plain values: ``title`` and, optionally, ``text``, and a table as
        ``columns`` (names) and ``rows`` (lists of as many cells: text, numbers, None). Markup is shown as it stands.
    :raises: nothing is written; so for a section that is not of that form.

    Example, the time of each guard as a table::

        @hookimpl
        def invarlock_report_sections(report):
            rows = [[guard["name"], guard["seconds"]] for guard in report["guards"]]
            return [{"title": "Time per guard", "columns": ["guard", "seconds"], "rows": rows}]
    """
