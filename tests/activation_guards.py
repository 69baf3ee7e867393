"""How the tests run a guard that looks at activations: taps on two passes, one before and one after damage."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn

from invarlock.evaluation.taps import attached
from invarlock.models.facts import evaluating
from invarlock.models.fingerprint import Fingerprint
from invarlock.testing import architectures

BUILDERS = architectures.ARCHITECTURES.values()


def tokens(seed: int = 0) -> list[torch.Tensor]:
    """Two batches for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(architectures.VOCABULARY, (2, 3, 24), generator=generator))


def observe(guard, model: nn.Module, batches):
    taps = guard.observe(model, None, {})
    with evaluating(model), attached(model, taps):
        for batch in batches:
            decoder = {"decoder_input_ids": batch} if model.config.is_encoder_decoder else {}
            model(input_ids=batch, attention_mask=torch.ones_like(batch), **decoder)
    return {name: tap.result() for name, tap in taps.items()}


def judge(guard, model: nn.Module, batches, damage=None, *, edited_batches=None):
    baseline = observe(guard, model, batches)
    assert guard.prepare(model, None, [], {})["ready"] is True
    edited = copy.deepcopy(model)
    if damage:
        with torch.no_grad():
            damage(edited)
    before = Fingerprint.of(edited)
    observations = {"baseline": baseline, "edited": observe(guard, edited, edited_batches or batches)}
    result = guard.validate(edited, None, {"observations": observations})
    assert Fingerprint.of(edited) == before
    json.dumps(result, allow_nan=False)
    return result


def on(module: str, change):
    return lambda model: change(model.get_submodule(module).weight)
