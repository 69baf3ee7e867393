"""The task of a model, and how it is to judge."""

from __future__ import annotations

from typing import Any

from invarlock.config.schema import RunConfig
from invarlock.core.errors import InputError, UsageError
from invarlock.core.records import COLUMNS, Samples, column, columns_of
from invarlock.evaluation.metric import Stopping
from invarlock.evaluation.task import Judging, Task
from invarlock.models.facts import ModelClass
from invarlock.plugins.contributions import Contained
from invarlock.plugins.manager import PluginManager


def find_task(plugins: PluginManager, model_class: ModelClass) -> Task:
    """The first task that owns a class, those of plugins before the built-in ones.

    :raises InputError: no task owns it.
    """
    known = plugins.tasks()
    # What plugins bring is contained; sorting keeps the order among them, and among the built-in ones.
    for contribution in sorted(known.values(), key=lambda each: not isinstance(each.value, Contained)):
        task: Task = contribution.value
        if task.owns(model_class):
            return task
    raise InputError(
        f"no task measures models of class {model_class.names[0]}; there are {', '.join(sorted(known))}; a plugin can "
        "add one by the hook invarlock_tasks"
    )


def suited(task: Task, documents: Samples | None) -> Samples | None:
    """The samples of a dataset as a task takes them: plain texts, unless it reads more.

    :raises UsageError: they have no column that it reads.
    """
    if documents is None:
        return None
    columns = columns_of(documents)
    if not columns & task.reads:
        raise UsageError(
            f"dataset.provider: the samples have {_listed(columns)}, and {task.name} models read {_listed(task.reads)}"
        )
    return column(documents, "text") if task.reads == {"text"} else documents


def _listed(columns: frozenset[str]) -> str:
    return " and ".join(name for name in COLUMNS if name in columns) or "nothing"


def judging_of(config: RunConfig, windows: int, tokenizer: Any = None, *, stopping: Stopping | None = None) -> Judging:
    """Limits and statistics of a configuration, for so many windows.

    :param tokenizer: as ``Judging`` has it.
    """
    section = config.eval
    return Judging(
        ratio=section.max_pm_ratio,
        limit=section.metric.limit,
        level=section.metric.ci_level,
        reps=section.metric.reps,
        seed=config.dataset.seed,
        improving=section.improving,
        windows=windows,
        stopping=stopping,
        tokenizer=tokenizer,
    )
