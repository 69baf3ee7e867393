"""Block reconstruction error: each part of the edited model, run alone on the baseline's hidden states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from invarlock.api import Guard, UsageError, one_line
from plugins_builtin.guards.figures import Suspect, first_few

if TYPE_CHECKING:
    from plugins_builtin.guards.reconstruction.calls import CallRecorder
    from plugins_builtin.guards.reconstruction.errors import PartError, PartJudgement, Reference

MOST_TOKENS = 256
LIMIT = 1.10
"""Default of ``eval.max_pm_ratio``, for callers without a configuration."""
HARMLESS = math.log(1.02)
DOUBT = 2.0
"""The factor between score and true rise, either way: the score is a second-order estimate from few tokens.

For 24 edits of all weights (2 to 8 bits, noise, pruning) of SmolLM2-135M it was 0.5 to 1.9 with text, 0.5 to 2.5 with
random tokens, 0.9 and 1.0 on average. A matrix that is lost altogether may cost four times its score.
"""


class ReconstructionGuard(Guard):
    """Runs every part of the edited model alone, on what the baseline gave it, and adds up what the errors cost.

    A part is a block, or a module outside of the blocks: embedding, final norm, head. The error of a block is that of
    its update, ||(f'(h) - h) - (f(h) - h)|| relative to ||f(h) - h|| (block reconstruction: Li et al. 2021, "BRECQ"),
    with h the baseline's hidden states, so that no block answers for those before it. What leaves the function of a
    block as it is (permuted or rescaled units, permuted heads, folded norms) leaves no error. Neither does a rotation
    of all hidden states, where the embedding shows it.

    The score estimates the rise of the log loss, in nats per token. For small errors it is a sum over parts of a
    sensitivity times the squared relative error (Malinovskii et al. 2024, the linearity theorem). The sensitivity
    comes from the curvature of the loss: an error d at the output of a part costs d'Fd / 2, where F is the Fisher
    information, the mean of g g' over gradients g of the log likelihood of outcomes that the model itself draws (BRECQ,
    section 3; Martens 2020, "New Insights and Perspectives on the Natural Gradient Method"). One outcome is drawn at
    each position, and its gradient carried back from the head, part by part; no token counts as more than ten typical
    ones. Final norm and head cost the divergence of their distributions, exactly. Rows of an embedding that the probe
    did not read count as often as tokens of their ids occur.

    Of a model without a head for tokens no likelihood tells what an error costs: an embedding model has none, and a
    classifier one outcome for a whole sample. The score is then half the sum of the squared relative errors. That of
    all-MiniLM-L6-v2 is 0.0013 at 8 bits per channel, 0.02 at 6, 0.26 at 4, and 1.8 at 4 bits per tensor; its vectors
    move by a cosine distance of 0.0005, 0.007, 0.08 and 0.6.

    The probe is the first window, as it passes through the model anyway. Where there are no windows it is random
    tokens, and a random image or sound where the model has a tower for it, in one forward pass of the baseline.

    - Abort: a part that gives NaN or infinity, or cannot be run.
    - Rollback, if no outputs were measured: a score above ``max_score``.
    - Warn: a score above ``warn_score``. Where outputs were measured that is the most: they know better. Where they
      were not, also edited weights in blocks that the probe does not reach, as those of a tower for sounds.

    :param tokens: number of tokens of the first window to use, at most 256; an image is used whole. Default 32: they
        cost as much as 200 tokens of a pass, 2 % of two passes over 24 windows of 256; more of them move the score by
        less than ``DOUBT``.
    :param random_tokens: number of random tokens to use where there are no windows, at most 256. Default 128: they
        differ more from each other than text does, and there is no evaluation pass beside which the time would count.
    :param seed: of the random tokens and of the outcomes that are drawn.
    :param max_score: default log(``eval.max_pm_ratio``) / 2, since the true rise may be twice the score, and that is
        the limit for measured outputs: as there, the upper end is held against it.
    :param warn_score: default 2 log(1.02), since the true rise may be half the score, and edits that cost up to 2 % are
        called harmless.
    :param suspects: largest number of modules to name. Default 5.
    """

    name = "reconstruction"
    taps_optional = True

    def __init__(
        self,
        tokens: int = 32,
        random_tokens: int = 128,
        seed: int = 42,
        max_score: float | None = None,
        warn_score: float = HARMLESS * DOUBT,
        suspects: int = 5,
    ) -> None:
        for option, value in (("tokens", tokens), ("random_tokens", random_tokens)):
            if not 1 <= value <= MOST_TOKENS:
                raise UsageError(f"{option}: {value} is not between 1 and {MOST_TOKENS}")
        for option, limit in (("max_score", max_score), ("warn_score", warn_score)):
            if limit is not None and not limit > 0:
                raise UsageError(f"{option}: {limit} is not above 0, the score of the unedited model")
        self.tokens = tokens
        self.random_tokens = random_tokens
        self.seed = seed
        self.max_score = max_score
        self.warn_score = warn_score
        self.suspects = suspects
        self._recorder: CallRecorder | None = None
        self._reference: Reference | None = None
        self._unmeasured = "prepare was not called"
        self._architecture: list[Any] = []
        """Of a baseline that another checkpoint is compared with."""

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._reference is not None:
            return {}
        from plugins_builtin.guards.reconstruction.calls import CallRecorder

        self._recorder = CallRecorder.of(model, self.tokens)
        return self._recorder.taps(model)

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        from plugins_builtin.guards.reconstruction.calls import CANNOT_RUN, record
        from plugins_builtin.guards.reconstruction.errors import Reference
        from plugins_builtin.guards.reconstruction.probes import images_of, of_tokens, random_inputs
        from plugins_builtin.guards.reconstruction.sameness import architecture_of

        if getattr(calib, "comparing", False):
            self._architecture = architecture_of(model)
        calls = self._recorder.take() if self._recorder else {}
        batch = next(iter(calib or ()), None)
        try:
            if not calls and batch is not None:
                calls = record(model, of_tokens(model, batch["input_ids"][:1, : self.tokens]), self.tokens, None)
            elif not calls:
                given, images = random_inputs(model, self.random_tokens, self.seed), images_of(model, self.seed)
                calls = record(model, given, self.random_tokens, images)
            self._reference = Reference(model, calls, seed=self.seed)
        except CANNOT_RUN as error:
            self._unmeasured = one_line(error)
            return {"ready": True, "not_measured": self._unmeasured}
        return {
            "ready": True,
            "probe": "random inputs" if batch is None else "the first window",
            "tokens": self._reference.positions,
            "parts": len(self._reference.parts),
            "not_measured": self._reference.unmeasured,
        }

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        edited = context.get("edited") or {}
        outputs_decide = edited.get("figure", edited.get("ratio")) is not None
        if self._reference is None:
            action = "warn" if outputs_decide else "abort"
            return {"passed": False, "action": action, "message": f"not measured: {self._unmeasured}"}
        from invarlock.api import find_blocks
        from plugins_builtin.guards.reconstruction.suspects import find_suspects

        judgement = self._judgement(self._reference, model, context)
        max_score = math.log(context.get("limit", LIMIT)) / DOUBT if self.max_score is None else self.max_score
        action = self._action(judgement, math.inf if outputs_decide else max_score)
        # Of an edit that seems harmless the costliest part alone is looked into, in case that others reject it.
        most = 1 if action == "continue" else self.suspects
        suspects = find_suspects(self._reference, judgement, model, most)
        message = _message(judgement, suspects if action != "continue" else [], self._reference.predicts)
        missed = (
            [] if outputs_decide else _missed(context, find_blocks(model).keys() & self._reference.unmeasured.keys())
        )
        if missed:
            action = "warn" if action == "continue" else action
            message += f"; {len(missed)} edited weights are in blocks that no probe reaches (as {missed[0]})"
        return {
            "passed": action in ("continue", "warn"),
            "action": action,
            "message": message,
            "warnings": [message] if action == "warn" else [],
            "metrics": {
                "score": judgement.score,
                "max_score": max_score,
                "warn_score": self.warn_score,
                "rotated": judgement.rotated,
                "parts": [_row(error, judgement.score) for error in judgement.errors],
                "suspects": [asdict(suspect) for suspect in suspects],
                "not_measured": self._reference.unmeasured,
            },
        }

    def _judgement(self, reference: Reference, model: Any, context: Mapping[str, Any]) -> PartJudgement:
        from plugins_builtin.guards.reconstruction.sameness import all_tensors_equal, architecture_of

        if all_tensors_equal(context) and self._architecture == architecture_of(model):
            return reference.unedited
        return reference.judge(model)

    def _action(self, judgement: PartJudgement, max_score: float) -> str:
        if any(error.failure for error in judgement.errors):
            return "abort"
        if judgement.score > max_score:
            return "rollback"
        return "warn" if judgement.score > self.warn_score else "continue"


def _missed(context: Mapping[str, Any], blocks: Collection[str]) -> list[str]:
    """Names of the edited weights that are in some blocks: in those of a tower whose inputs no probe makes."""
    edited = [each["name"] for each in context.get("edit", {}).get("modules", []) if each["change"] != "unchanged"]
    return [name for name in edited if any(name.startswith(f"{block}.") for block in blocks)]


def _message(judgement: PartJudgement, suspects: Sequence[Suspect], predicts: bool) -> str:
    failed = [f"{error.name} {error.failure}" for error in judgement.errors if error.failure]
    if failed:
        return first_few(failed)
    estimate = f"the log loss rises by an estimated {judgement.score:.3g} nats per token"
    if not predicts:
        estimate = f"the errors of its parts add up to {judgement.score:.3g}"
    if suspects:
        return f"{estimate}, most of it from {suspects[0].module}: {suspects[0].evidence}"
    worst = max(judgement.errors, key=lambda error: error.nats)
    basis = ", in rotated hidden states" if judgement.rotated else ""
    return f"{estimate}{basis}; {worst.name} contributes most, with a relative error of {worst.relative:.2g}"


def _row(error: PartError, score: float) -> dict[str, Any]:
    return {
        "name": error.name,
        "relative_error": error.relative,
        "nats": error.nats,
        "share": error.nats / score if 0 < score < math.inf else None,
        "failure": error.failure,
    }
