"""A run: its text, its tasks, its formats, its report, and commands beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from invarlock.hookspecs.marker import hookspec


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
def invarlock_tasks() -> Sequence[Any] | None:
    """Add tasks: kinds of models, with the samples that they read, what is compared of them, and what decides.

    :called: by ``invarlock plugins``, and before a model is loaded: so import what is slow to import in the methods.
    :returns: tasks, of classes with ``invarlock.api.LanguageTask``, ``VectorTask`` or ``Task`` as base, each with a
        ``name``. The first one that ``owns`` the class of a model measures it, those of plugins before the built-in.
    :raises: nothing is run; so for a name that is taken, or anything but a list of objects with a ``name``.

    Example, models that tell whether one sentence follows another, judged by the cosine of their two scores::

        from invarlock.api import Metric, VectorTask

        class NextSentence(VectorTask):
            name, metric = "next sentence", Metric("cosine_distance", "mean", limit=0.02)

            def owns(self, model_class):
                return any(name.endswith("ForNextSentencePrediction") for name in model_class.names)

            def vectors(self, model, batch):
                return {"scores": model(**batch).logits}

        @hookimpl
        def invarlock_tasks():
            return [NextSentence()]
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
    :param report: ``bitwidth``, ``modules`` (effects on weights), ``guards``, ``metrics``, ``coverage``, ``verdict``,
        ``plan``, ``bits_per_weight``, ``seconds``.
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
