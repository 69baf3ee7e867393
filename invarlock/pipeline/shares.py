"""BaselineFisher for the shares of a report: from so few tokens that every run can have them.

Nothing that is judged rests on them: where they cannot be had, the report says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import nn

from invarlock.core.errors import one_line
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.evaluation.passes import predicted_tokens
from invarlock.evaluation.task import LanguageTask
from invarlock.models.facts import Predicted, device_of
from invarlock.models.snapshot import has_room
from invarlock.pipeline.guarding import Guarding
from invarlock.quantization.selection import WeightTarget
from invarlock.search.fisher import BaselineFisher, fisher_of

TOKENS = 80
"""Of one window. Forward and back, they take 1.4 times as long as one of 256 forward; a run has dozens."""
COPIES = 3
"""Of the inputs and outputs of all weights and of the largest gradient: they are kept, and squared in float32."""


def sensitivities_for_shares(guarding: Guarding, model: nn.Module, targets: Sequence[WeightTarget]) -> BaselineFisher:
    """How much the loss of a baseline depends on some weights, as far as a few tokens tell.

    :param model: the baseline, as it is unedited.
    """
    session, task = guarding.session, guarding.baseline.task
    if guarding.windows is None:
        return BaselineFisher(None, "the outputs are not measured")
    if not isinstance(task, LanguageTask):
        return BaselineFisher(None, f"{task.name} models predict no tokens")
    if guarding.baseline.sharding is not None:
        return BaselineFisher(None, "the weights are spread over processes")
    if session.reference is not None:
        return session.reference.sensitivities
    with session.clock.stage("sensitivities"):
        window, seed = few_tokens(guarding.windows[0], task.predicted), session.config.dataset.seed
        return session.ranks.from_first(partial(_measured, model, window, targets, task.predicted, seed))


def few_tokens(preview: Windows, task: Predicted) -> Windows:
    """The beginning of that window in which most tokens are scored."""
    short = preview.cut(TOKENS)
    scored = (predicted_tokens(short, task) != UNSCORED).sum(dim=1)
    most = int(scored.argmax())
    # The tokens that stand for an image are as many as the model makes of it.
    return (preview if preview.media else short)[most : most + 1]


def _measured(
    model: nn.Module, window: Windows, targets: Sequence[WeightTarget], task: Predicted, seed: int
) -> BaselineFisher:
    if not has_room(_bytes_needed(window, targets), device_of(model)):
        return BaselineFisher(None, "gradients do not fit in memory")
    try:
        fisher = fisher_of(model, window, targets, task=task, seed=seed)
    except Exception as error:
        # A model's own code may fail in any way, and a run that needs no gradients goes on without them.
        return BaselineFisher(None, f"the baseline has no gradients: {one_line(error)}")
    if not 0 < sum(float(each.rows.sum()) for each in fisher.values()) < math.inf:
        return BaselineFisher(None, "the gradients of the baseline are zero, or not finite")
    return BaselineFisher(fisher)


def _bytes_needed(window: Windows, targets: Sequence[WeightTarget]) -> int:
    """For the hidden states that a backward pass reads, and for the largest gradient."""
    sizes = [sum(target.parameter.shape[-2:]) * target.parameter.element_size() for target in targets]
    largest = max((target.parameter.numel() for target in targets), default=0)
    return COPIES * (window.length * sum(sizes) + 4 * largest)
