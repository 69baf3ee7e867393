"""Every hook of InvarLock: when it is called, what it gets, what it returns.

A plugin implements any of these with ``@invarlock.hookimpl``, on functions of a module or methods of an object, and may
take any subset of a hook's arguments, by name. An implementation with ``wrapper=True`` runs around the others: it takes
the same arguments, yields once, gets the result from the yield and returns it. A wrapper that fails, does not yield or
loses the result is named and ends with exit code 3; what it wraps keeps its result.

Each example below is a whole plugin: put into a file ``mine.py``, it works with ``-p mine``. A guard is run if it
stands in ``guards.order``, an adapter if ``model.adapter`` names it or, with ``auto``, if it owns ``model.id``. A guard
that counts the weights that a model has lost::

    from invarlock import hookimpl

    @hookimpl
    def invarlock_validate(model):
        zeros = sum((p == 0).sum().item() for p in model.parameters())
        return {"passed": zeros == 0, "action": "warn" if zeros else "continue", "metrics": {"zeros": zeros}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse

hookspec = pluggy.HookspecMarker("invarlock")

# -- loading a model: asked of one adapter after the other, plugins before built-ins, trylast last --------------------


@hookspec(firstresult=True)
def invarlock_load_model(model_id: str, device: str, options: Mapping[str, Any]) -> Any:
    """Load a model.

    Called once a run. With ``model.adapter: NAME`` only that adapter is asked; with ``auto`` one after the other.

    :param model_id: ``model.id`` of the configuration: a path or an id on a hub.
    :param device: ``model.device``: "auto", "cpu", "cuda", "cuda:1", "mps".
    :param options: ``dtype``, ``trust_remote_code`` and ``revision`` of the configuration, and ``stream``, true where
        weights shall stay on disk.
    :returns: a ``torch.nn.Module``, or None from an adapter that does not own the id.
        Stops at the first non-None result.

    On raise: an adapter asked for by name ends the run (exit code 3, or 2 for a ``UsageError`` or an ``OSError``);
    with ``auto`` a ``UsageError`` ends it too, and any other exception is said and the next adapter asked.

    Example, an adapter for ids such as ``folder:path/to/checkpoint``::

        from invarlock import hookimpl

        @hookimpl
        def invarlock_load_model(model_id):
            from transformers import AutoModelForCausalLM

            owned = model_id.startswith("folder:")
            return AutoModelForCausalLM.from_pretrained(model_id.removeprefix("folder:")) if owned else None
    """


@hookspec(firstresult=True)
def invarlock_load_tokenizer(model_id: str, options: Mapping[str, Any]) -> Any:
    """Load the model's own tokenizer.

    Called of the adapter that loaded the model: once a run, if text has to become windows or the model is to be saved;
    in a comparison for each checkpoint.

    :param model_id: ``model.id``.
    :param options: ``trust_remote_code`` and ``revision``.
    :returns: a tokenizer as those of transformers; None leaves it to transformers' ``AutoTokenizer``.
        Stops at the first non-None result.

    On raise: the adapter is named and the run ends before anything is measured: exit code 3, or 2 for a ``UsageError``.

    Example, an adapter whose tokenizer lies in a folder of its own::

        from invarlock import hookimpl
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

    Called once, after loading, of the adapter that loaded the model.

    :param model: the loaded model.
    :returns: a dict of plain values: model_type, model_class, n_layer, n_head, ...; None leaves it to the default,
        which reads the model's ``config``. Stops at the first non-None result.

    On raise: the adapter is named and the run ends before anything is measured: exit code 3.

    Example, a wrapper that adds to what the adapter of any model tells::

        from invarlock import hookimpl

        @hookimpl(wrapper=True)
        def invarlock_describe(model):
            described = yield
            return {**described, "megabytes": sum(p.nbytes for p in model.parameters()) / 1e6}
    """


@hookspec(firstresult=True)
def invarlock_snapshot(model: Any) -> Any:
    """Keep what is needed to bring the model back bit for bit.

    Called once a run, before the first guard sees the model.

    :param model: the baseline.
    :returns: anything; it is handed to ``invarlock_restore`` as it is. None leaves both to the default, which writes
        each tensor to a temporary folder. Stops at the first non-None result.

    On raise: the adapter is named and the run ends before the edit: exit code 3.

    Example, an adapter that keeps the baseline in memory::

        from invarlock import hookimpl
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
    """Bring the model back to what it was at ``invarlock_snapshot``.

    Called after a rollback, an abort, an exception or Ctrl-C, and to undo what a guard changed. The pipeline compares
    fingerprints afterwards: a baseline that did not come back bit for bit is an error of the adapter.

    :param model: the model to bring back, in place.
    :param snapshot: what ``invarlock_snapshot`` returned.
    :returns: True when it was restored; None leaves it to the default. Stops at the first non-None result.

    On raise: the run ends with exit code 3 and nothing is saved.

    Example, a wrapper that says when the baseline is back::

        import sys
        from invarlock import hookimpl

        @hookimpl(wrapper=True)
        def invarlock_restore():
            restored = yield
            print("the baseline is back", file=sys.stderr)
            return restored
    """


# -- judging an edit: one guard at a time, in the order of guards.order ------------------------------------------------


@hookspec(firstresult=True)
def invarlock_observe(model: Any, adapter: Any, policy: Mapping[str, Any], guard: str) -> Mapping[str, Any] | None:
    """Ask for the inputs and outputs of modules.

    Called for each guard before each of the two forward passes, the baseline's and the edited model's.

    :param model: the model as it will be run; it must not be changed.
    :param adapter: the adapter that loaded it, as an object with the methods of ``ModelAdapter``.
    :param policy: the guard's options, as in the configuration.
    :param guard: the name of the guard that is asked.
    :returns: a tap for each module name to look at: a callable ``tap(module, args, kwargs, output)`` with a method
        ``result()``. It is called for the preview windows, and must change nothing. None asks for nothing.
        Stops at the first non-None result.

    On raise, or for anything but taps by module name: an error of that guard, which counts as abort.

    Example, a guard that looks at the largest output of each MLP block::

        from invarlock import hookimpl

        class Largest:
            value = 0.0

            def __call__(self, module, args, kwargs, output):
                self.value = max(self.value, output.abs().max().item())

            def result(self):
                return self.value

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
def invarlock_prepare(
    model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any], guard: str
) -> Mapping[str, Any] | None:
    """Look at the baseline, before the edit.

    Called for each guard, in the order of ``guards.order``, as a call of its own that reaches this guard and every
    wrapper.

    :param model: the baseline; it must not be changed.
    :param adapter: the adapter that loaded it, as an object with the methods of ``ModelAdapter``.
    :param calib: the preview windows: an iterable of batches, dicts of ``input_ids`` and ``attention_mask``.
    :param policy: the guard's options, as in the configuration.
    :param guard: the name of the guard that is asked; of use to wrappers.
    :returns: a dict with ``ready``, True or False; None counts as ready. Stops at the first non-None result.
        What is kept of the model for ``invarlock_validate`` has to be a copy: the edit happens in place.

    On raise, with ``ready: False``, or where ``ready`` is neither True nor False: abort before the edit. The other
    guards are still prepared.

    Example, a guard that compares the norm of each parameter with what it was::

        from invarlock import hookimpl

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

    Called for each guard, in the order of ``guards.order``, as a call of its own that reaches this guard and every
    wrapper. All guards are called, whatever one of them says, unless ``guards.fail_fast`` is set.

    :param model: the edited model; it must not be changed.
    :param adapter: the adapter that loaded it, as an object with the methods of ``ModelAdapter``.
    :param context: ``baseline`` and ``edited`` (what the passes measured), ``edit`` (the plan and what it did to each
        module), ``limit`` (``eval.max_pm_ratio``, the largest ratio of the metric to accept), ``policy``,
        ``observations`` (what the taps collected before and after), ``attempt``, ``device``, ``rank``.
    :param guard: the name of the guard that is asked; of use to wrappers.
    :returns: a dict: ``passed`` (bool), ``action`` ("continue", "warn", "rollback", "abort"), ``message``,
        ``metrics`` (a dict of figures) and ``warnings`` (a list of texts). An edit that did not pass is one to warn of,
        to roll back or to abort; "continue" goes with ``passed`` False only where ``metrics["measured"]`` is False,
        too: then the guard says neither. Stops at the first non-None result.

    On raise, without ``passed``, with an unknown or a contradicting action, or where ``metrics`` hold what is no data:
    an error of that guard, which counts as abort; the traceback is in the report. What is too long for a report is cut,
    with a warning that says so: lists to 10,000 entries, tensors of more than 1,000 numbers to their shape.

    A change of the model, of what hangs on its modules (hooks, attributes), of its configuration or its tokenizer is an
    error of the guard, too: it is undone and named.

    Example, a timer around every guard::

        import sys, time
        from invarlock import hookimpl

        @hookimpl(wrapper=True)
        def invarlock_validate(guard):
            started = time.perf_counter()
            result = yield
            print(f"{guard} took {time.perf_counter() - started:.2f} s", file=sys.stderr)
            return result
    """


# -- what a run reads and writes: plugins are asked before built-ins ---------------------------------------------------


@hookspec(firstresult=True)
def invarlock_documents(dataset: Any) -> Sequence[str] | None:
    """Give the text that a model is measured on.

    Called once a run, before a model is loaded, unless ``dataset.provider`` is ``generated``; of one plugin after the
    other. A provider goes by the name of its plugin: other names are not listed, and none is near a misspelled one.

    :param dataset: the section ``dataset`` of the configuration: ``provider``, ``path``, ``name``, ``text_field``,
        ``split`` and ``seed`` are for providers to read; it must not be changed.
    :returns: the documents, a list of texts or another sequence, which is read no further than needed and in an order
        of the run's own; None from a plugin that does not own ``dataset.provider``. Stops at the first non-None result.

    On raise, or for what is not a sequence of texts: the provider is named and nothing is measured: exit code 3, or 2
    for a ``UsageError``.

    Example, ``dataset.provider: mine``, which reads each file of the folder ``dataset.path`` as a document::

        from pathlib import Path
        from invarlock import hookimpl

        @hookimpl
        def invarlock_documents(dataset):
            if dataset.provider != "mine":
                return None
            return [path.read_text() for path in sorted(Path(dataset.path).glob("*.txt"))]
    """


@hookspec
def invarlock_exporters() -> Sequence[Any] | None:
    """Add formats in which an accepted model can be saved.

    Called when a configuration is held against the plugins, and by ``invarlock plugins``: so import what is slow to
    import when the model is saved.

    :returns: a list of exporters, of classes with ``invarlock.api.Exporter`` as base; the ``name`` of each is a value
        of ``output.format``. All implementations are called; a name that is taken is an error.

    On raise, or for anything but a list of objects with a ``name``: the plugin is named and nothing is run: exit
    code 3.

    Example, a format of one file::

        from invarlock import hookimpl
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

    Called by ``invarlock report`` and ``invarlock plugins``: so import what is slow to import when a report is
    rendered.

    :returns: a list of formats: objects with ``name``, which ``invarlock report --format`` takes, ``suffix`` of such
        files, and ``render``, which makes a text of one report or several. All implementations are called; a name that
        is taken is an error.

    On raise, or for anything but a list of objects with a ``name``: the plugin is named: exit code 3.

    Example, the verdict in one word::

        from invarlock import hookimpl

        class Word:
            name, suffix = "word", ".txt"

            def render(self, runs):
                return " ".join(run.report.verdict.action for run in runs)

        @hookimpl
        def invarlock_report_formats():
            return [Word()]
    """


# -- the command line, attempts and the report -------------------------------------------------------------------------


@hookspec
def invarlock_add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add commands to ``invarlock``.

    Called when the parser is built, of plugins in the form of a module or an object: a class has no instance yet. The
    built-in commands are there before, and keep their names.

    :param subparsers: add a parser to it and set ``run``, a function of the parsed arguments that returns an exit
        code: ``parser.set_defaults(run=run)``.
    :returns: nothing.

    On raise: the plugin is named, and the commands of the others are there all the same.

    Example, the command ``invarlock -p mine hello``::

        from invarlock import hookimpl

        @hookimpl
        def invarlock_add_commands(subparsers):
            subparsers.add_parser("hello", help="say hello").set_defaults(run=lambda args: print("hello") or 0)
    """


@hookspec
def invarlock_attempt_finished(attempt: int, report: dict[str, Any]) -> None:
    """Look at one attempt of the edit, as soon as its verdict is known.

    Called once for each attempt of a run, and once in a comparison, by the first process: after all guards were asked
    and the verdict was folded, before a rejected edit is undone and the next attempt begins. An abort before the edit,
    when a guard was not ready, is an attempt, too.

    :param attempt: its number, counted from 1.
    :param report: plain values, as ``report.json`` would hold them: ``bitwidth``, ``modules`` (what was done to each
        weight), and the sections ``guards``, ``metrics`` and ``verdict``. A copy: changes reach no later stage.
    :returns: nothing; all implementations are called, the last registered first.

    On raise: the plugin is named, the baseline restored, no further attempt made, nothing saved; exit code 3.

    Example, a line of JSON for each attempt::

        import json
        from invarlock import hookimpl

        @hookimpl
        def invarlock_attempt_finished(attempt, report):
            with open("attempts.jsonl", "a") as log:
                print(json.dumps({"attempt": attempt, "verdict": report["verdict"]["action"]}), file=log)
    """


@hookspec
def invarlock_run_finished(report: dict[str, Any]) -> dict[str, Any] | None:
    """Look at the report of a run, and add to it.

    Called once a run, after the report exists and before it is written. The model was judged by then: a change of it,
    of its configuration or of its tokenizer ends the run with exit code 3, and nothing is saved.

    :param report: a copy of the report as ``report.json`` will hold it. Keys that are put below ``report["extra"]`` are
        taken over; no other change is.
    :returns: a dict of plain values that go below ``extra``, or None. All implementations are called, the last
        registered first.

    On raise: the plugin is named, the baseline restored, and nothing is written; exit code 3.

    Example, the number of a ticket::

        import os
        from invarlock import hookimpl

        @hookimpl
        def invarlock_run_finished():
            return {"ticket": os.environ.get("TICKET")}
    """


@hookspec
def invarlock_report_sections(report: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Add sections to the report, which every rendering of it shows.

    Called once a run, after ``invarlock_run_finished`` and before anything is written. The sections are kept in
    ``report["sections"]``, so that ``invarlock report`` shows them later without the plugin.

    :param report: a copy of the report as ``report.json`` will hold it, to be read.
    :returns: a list of sections, dicts of plain values: ``title`` and, of one's choice, ``text``, and a table as
        ``columns`` (names) and ``rows`` (lists of as many cells: text, numbers, None). No markup: it would be shown as
        it stands. None adds nothing; all implementations are called, the last registered first.

    On raise, or for a section that is not of that form: the plugin is named, the baseline restored, and nothing is
    written; exit code 3.

    Example, the time of each guard as a table::

        from invarlock import hookimpl

        @hookimpl
        def invarlock_report_sections(report):
            rows = [[guard["name"], guard["seconds"]] for guard in report["guards"]]
            return [{"title": "Time per guard", "columns": ["guard", "seconds"], "rows": rows}]
    """
