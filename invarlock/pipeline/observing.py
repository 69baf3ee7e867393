"""Guards' taps on a pass, and what guards must leave as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from invarlock.core.errors import InputError, InvarlockError, PluginError, named_by, one_line
from invarlock.pipeline.keeping import Watched, some
from invarlock.pipeline.session import SUBJECT, Baseline, WindowPair
from invarlock.pipeline.stepping import Watching
from invarlock.plugins.manager import GuardSlot
from invarlock.plugins.observation import Observation
from invarlock.plugins.plugin import Origin


def watching_of(
    baseline: Baseline,
    slots: Sequence[GuardSlot],
    model: torch.nn.Module,
    stage: str,
    watched: Watched,
    windows: WindowPair | None,
    own: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[Observation], Watching]:
    """The observations of all guards on a pass, and the taps that collect them.

    :param own: taps of our own.
    :raises PluginError: a tap changed the model; whose it is cannot be told.
    """
    observing = baseline.sees_preview
    observations = [observe(baseline, slot, model, watched) if observing else Observation() for slot in slots]
    tapping = [slot for slot, observed in zip(slots, observations, strict=True) if observed.wanted]
    strangers = [slot.name for slot in tapping if slot.plugin.origin is not Origin.BUILTIN]
    if strangers and windows is not None and not baseline.sharding:
        # What their taps change must not be taken for the model's own doing: it runs once without them.
        baseline.run_alone(model, windows)
        watched.settle()

    def taps_off() -> None:
        if not strangers:
            watched.settle()
        elif changed := baseline.undo(watched):
            raise PluginError(f"taps of {', '.join(strangers)}: the model changed in the {stage}: {some(changed)}")

    return observations, Watching([*(observation.taps for observation in observations), *own], taps_off)


def observe(baseline: Baseline, slot: GuardSlot, model: torch.nn.Module, watched: Watched) -> Observation:
    """Ask a guard for its taps: a hook that it puts on the model itself could change what the pass measures."""
    plugins = baseline.session.plugins
    with settings_kept():
        observation = plugins.observe(slot, baseline.shown(model), baseline.adapter)
    if plugins.watches(slot) and (changed := baseline.undo(watched)):
        observation.fail("observe", PluginError(changed_message(changed)))
        observation.wanted = {}
    return observation


@contextmanager
def failures_named(baseline: Baseline, model: torch.nn.Module, windows: WindowPair | None) -> Iterator[None]:
    """Tell a subject that cannot be run, by its configuration, from a failure of ours or of a guard's.

    :raises InputError: the block failed, and the model fails on a single window with nobody looking on, too.
    """
    try:
        yield
    except InvarlockError:
        raise
    except Exception:
        if windows is not None:
            _run_one(baseline, model, windows)
        raise


@named_by(SUBJECT)
def _run_one(baseline: Baseline, model: torch.nn.Module, windows: WindowPair) -> None:
    preview, final = windows
    try:
        baseline.task.measure(model, preview[:0], final[:1])
    except InvarlockError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} fails on a window: {one_line(error)}") from error


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's defaults and Python's recursion limit back after the block: the next guard must not inherit them."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    depth = sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            # None, not the CPU: torch would go on looking at every call, as it does for any device but none.
            torch.set_default_device(None if device.type == "cpu" else device)


def changed_message(names: Sequence[str]) -> str:
    return f"the guard changed the model ({some(names)}); the change was undone"
