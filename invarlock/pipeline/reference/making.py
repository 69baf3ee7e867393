"""A reference in the making: the baseline is measured once, with the taps of all guards on it, and kept."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from invarlock.checkpoints.output_folder import unwritable_said
from invarlock.checkpoints.swapping import is_folder, is_there
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError
from invarlock.core.progress import Progress
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Loaded
from invarlock.pipeline.reference.facts import facts_of
from invarlock.pipeline.reference.kept import Reference, kept_observations
from invarlock.pipeline.reference.noise import noise_of
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.shares import sensitivities_for_shares
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.selection import find_weights

log = logging.getLogger("invarlock")
OUT = "--out"


@dataclass(frozen=True)
class Made:
    """A reference that was written."""

    digest: str
    windows: tuple[int, int]
    tokens: int
    """Scored tokens."""


def make_reference(
    config: RunConfig,
    plugins: PluginManager,
    folder: Path,
    *,
    noise: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> Made:
    """Measure the baseline ``config.model.id``, and write a reference to a new folder.

    :param noise: measure it in other ways, too, so that a difference can be held against what the machine makes.
    :raises UsageError: for a mistake in the configuration, a broken checkpoint, or a folder that is there; nothing was
        written.
    """
    _check_place(folder, config.model.id)
    slots = plugins.guard_slots(config.guards.order, config.guards.options)
    session = Session(config, plugins, on_progress)
    session.documents()
    model, adapter = session.load(config.model.id)
    baseline = Baseline(session, model, adapter, wants_tokenizer=True)
    windows = baseline.make_windows(model)
    watched = Loaded.of(model, session.clock)
    guarding = Guarding(session, baseline, windows, slots)
    windows, measured = guarding.measure_baseline(model, watched)
    guards, refused = kept_observations(slots, measured.observed)
    for reason in refused:
        log.warning("%s; runs with this guard run the baseline's pass again", reason)
    sensitivities = sensitivities_for_shares(guarding, model, find_weights(model))
    facts = facts_of(baseline, model, watched.digest)
    runs = [*noise_of(baseline, model, windows[1], measured)] if noise else []
    by_mark = watched.prints.by_mark
    reference = Reference(facts, windows, measured, guards, runs, sensitivities, by_mark)
    with session.clock.stage("save"), unwritable_said(folder, OUT):
        digest = reference.write(folder)
    return Made(digest, (config.dataset.preview_n, measured.looks[-1]), measured.tokens)


def _check_place(folder: Path, model_id: str) -> None:
    """Refuse what must not be written to, before anything is measured.

    :raises UsageError: something is there, or the folder lies inside of the checkpoint or cannot be made.
    """
    if is_there(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise UsageError(f"{OUT}: {folder} is there already; choose another folder")
    checkpoint, whole = Path(model_id).resolve(), folder.resolve()
    if checkpoint.exists() and checkpoint in (whole, *whole.parents):
        raise UsageError(f"{OUT}: {folder} lies inside the input checkpoint {model_id}; choose another folder")
    existing = next(parent for parent in whole.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{OUT}: no folder can be made in {existing}; choose another")
