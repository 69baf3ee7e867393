"""The task of a model: the first one that owns its class, those of plugins before the built-in ones."""

from __future__ import annotations

from invarlock.core.errors import InputError
from invarlock.evaluation.task import Task
from invarlock.models.facts import ModelClass
from invarlock.plugins.contributions import Contained
from invarlock.plugins.manager import PluginManager


def find_task(plugins: PluginManager, model_class: ModelClass) -> Task:
    """:raises InputError: no task owns the class."""
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
