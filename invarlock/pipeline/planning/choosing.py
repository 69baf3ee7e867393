"""Plans of the attempts of a run: configured and repaired, or searched."""

from __future__ import annotations

from pathlib import Path

from invarlock.exporters.saving import Export
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Loaded, WatchingStreamed
from invarlock.pipeline.planning.contributions import fisher_or_none
from invarlock.pipeline.planning.probing import Probe, Rounded
from invarlock.pipeline.planning.retrying import Retries
from invarlock.pipeline.planning.searching import Search
from invarlock.pipeline.planning.sensitivities import measured_fisher, measured_inputs, needs_sensitivities, scales_of
from invarlock.pipeline.shares import sensitivities_for_shares


def plans_for(
    guarding: Guarding,
    baseline: Loaded | WatchingStreamed,
    rounded: Rounded,
    export: Export | None,
    folder: Path | None,
    *,
    frontier: bool,
) -> Retries | Search:
    """The plans of the attempts, after what has to be measured of the baseline for them.

    :param rounded: as of a search, as ``export``, ``folder`` and ``frontier`` are.
    """
    config, model = guarding.config, baseline.model
    if config.edit.is_searched and guarding.ready:
        return Search(guarding, baseline, rounded, export, folder, frontier=frontier)
    retries = Retries(config, model, guarding.baseline.tokenizer, export)
    if guarding.ready and "inputs" in scales_of(config.edit.plan):
        retries.fisher = measured_inputs(guarding, retries.targets, Probe(guarding, model, rounded))
    elif guarding.ready and needs_sensitivities(config.edit.plan):
        retries.fisher = guarding.fisher = measured_fisher(guarding, model, retries.targets)
    elif guarding.ready and config.eval.attribute:
        guarding.fisher = fisher_or_none(guarding, model, retries.targets)
    if guarding.ready and guarding.fisher is None and not baseline.streamed:
        guarding.sensitivities = sensitivities_for_shares(guarding, model, retries.targets)
    return retries
