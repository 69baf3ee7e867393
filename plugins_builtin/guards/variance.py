"""Outputs of every module on the same tokens before and after the edit, and the modules where the error arises."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.api import Guard
from plugins_builtin.guards.figures import TOP, Suspect, measured, not_finite, not_measured, ratio, rounded, suspects
from plugins_builtin.guards.options import families_in, family_of, number, refuse, whole

if TYPE_CHECKING:
    import torch

    from plugins_builtin.guards.activations import Place, SamplingTap, SeenPlace

NUMBERS = 3 << 20
"""Largest number of values in all samples of one pass, but for 8 tokens each: 12 MiB in float32, so that a reference
which holds them stays small. Models of some 100 M parameters are at it; smaller ones have 64 tokens of each module."""
HUGE = 10.0
"""An error so many times the output is no rounding, and may overflow where it goes."""


class VarianceGuard(Guard):
    """Compares the outputs of every module that has parameters, on the same few tokens of the preview windows.

    For each: mean and variance before and after, the relative error ||y' - y|| / ||y|| of what comes out, and by how
    much that exceeds the error of what went in, ``sqrt(max(0, out² - in²))``: errors of independent sources add up in
    squares, so this *jump* is what the module itself adds, and a damaged module has the largest.

    It warns when the logits are off by more than ``deadband`` (without an output head, the last output), and never does
    more. Inner outputs alone are no harm: permuted units change them wholly and the logits not at all. NaN or Inf
    that the baseline has not aborts.

    Where one factor per output channel would undo much of a module's error, the guard reports it. The factor is the
    least-squares one, ``a_c = <y_c, y'_c> / <y'_c, y'_c>``, fitted on one half of the tokens. Its gain is the share of
    the squared error that it takes away on the other half, compared with doing nothing or with leaving the output out,
    whichever is better: ``1 - sum ||y - a y'||² / min(sum ||y - y'||², sum ||y||²)``. The guard never applies it.

    Options:

    ``deadband`` (0.1)
        Relative error of the logits that is ignored. Errors d of the logits shift a next-token distribution p by a KL
        divergence of Var_p(d) / 2, to second order. Where logits vary by about 2 among the tokens that p gives any
        chance, an error of 0.1 comes to (0.1 * 2)² / 2 = 0.02 nats: 2 % of perplexity. A token's logits are taken
        relative to their mean, which no probability depends on.
    ``scope`` (all)
        Modules whose jumps are reported and may be corrected: ``ffn``, ``attn``, or ``all``, norms and embeddings too.
    ``min_gain`` (0.5)
        The least gain of a correction that is worth proposing: half of the error. What rounding does has no such gain,
        for its errors do not go along with the output; a scale that was lost or applied twice has nearly 1.
    ``max_calib`` (64)
        How many tokens to look at in each module; fewer where there are very many features, so that all samples of a
        pass take 12 MiB, and 8 at least. 64 tokens leave a share of 1 / 64 of the error that a fitted factor takes away
        by chance.
    ``seed`` (0)
        Of the choice of tokens.
    """

    name = "variance"

    RETIRED: ClassVar[Mapping[str, str]] = {
        "absolute_floor_ppl": "the primary metric judges perplexity; see eval.max_pm_ratio",
        "alpha": "errors are measured on the same tokens, not tested; use deadband",
        "calibration": "the preview windows are always used; max_calib sets how many of their tokens",
        "clamp": "a correction is proposed as it is and never applied; there is nothing to clamp",
        "max_adjusted_modules": "no module is ever adjusted; the proposal names the modules that gain most",
        "max_scale_step": "no scale is ever applied; there is nothing to limit",
        "min_abs_adjust": "use min_gain",
        "min_effect_lognll": "the primary metric judges the log loss; use min_gain for the gain of a correction",
        "min_rel_gain": "use min_gain",
        "mode": "the guard only measures and proposes corrections",
        "monitor_only": "the guard never does more than monitor",
        "predictive_gate": "the gain of a correction is always predicted on tokens that it was not fitted on",
        "predictive_one_sided": "the guard always measures both sides",
        "tap": "every module with parameters is measured; scope narrows what is reported",
        "target_modules": "every module with parameters is measured; scope narrows what is reported",
        "tie_breaker_deadband": "use deadband",
        "topk_backstop": "use min_gain; only corrections that reach it are proposed",
    }

    def __init__(
        self,
        deadband: float = 0.1,
        scope: str = "all",
        min_gain: float = 0.5,
        max_calib: int = 64,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        refuse(type(self), unknown, self.RETIRED)
        self._deadband = number("deadband", deadband, 0)
        self._families = families_in(scope)
        self._min_gain = number("min_gain", min_gain, 0, 1)
        self._tokens = whole("max_calib", max_calib, 8)
        self._seed = whole("seed", seed, 0)
        self._places: dict[str, Place] = {}

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> dict[str, SamplingTap]:
        from plugins_builtin.guards.activations import taps

        self._places = {place.name: place for place in _places(model)}
        budget = NUMBERS // max(1, 2 * len(self._places))
        return taps(self._places.values(), self._tokens, self._seed, budget=budget, outputs=True)

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        from plugins_builtin.guards.activations import seen_places

        seen = seen_places(context, self._places, "outputs")
        outputs = [output for output in map(_Output.of, seen) if output]
        if any(each.harmed for each in seen):
            return _not_finite(seen, outputs)
        if not outputs:
            return not_measured("no outputs of the same tokens before and after")
        return self._result(outputs, seen)

    def _result(self, outputs: Sequence[_Output], seen: Sequence[SeenPlace]) -> dict[str, Any]:
        last = next((output for output in outputs if output.place.is_head), outputs[-1])
        ranked = sorted(outputs, key=lambda output: -output.jump)
        told = [output for output in ranked if output.place.family in self._families]
        message = f"the output of {last.place.name} has a relative error of {last.error:.3g}"
        if told and told[0].jump:
            message += f"; most of the error arises in {told[0].evidence}"
        warnings = [message] if last.error > self._deadband else []
        metrics = {
            "outputs": len(outputs),
            "last": last.metrics,
            "median_error": rounded(median_low(output.error for output in outputs)),
            "modules": [output.metrics for output in told[:TOP] if output.jump],
            "proposal": self._proposal(told[:TOP]),
            "suspects": suspects(output.suspect for output in told if output.jump > 0),
        }
        compared = {output.place for output in outputs}
        return measured(message, warnings, metrics, [each.place.name for each in seen if each.place not in compared])

    def _proposal(self, outputs: Sequence[_Output]) -> list[dict[str, Any]]:
        """Corrections that are worth it, the largest gain first."""
        corrections = [correction for output in outputs if (correction := output.correction())]
        worth = [correction for correction in corrections if (correction["predicted_gain"] or 0) >= self._min_gain]
        return sorted(worth, key=lambda correction: -correction["predicted_gain"])


@dataclass(frozen=True, eq=False)
class _Output:
    """The output of a module on the same tokens, (tokens, channels) in float32, and how the two sides compare."""

    place: Place
    before: torch.Tensor
    after: torch.Tensor
    error: float
    error_in: float | None
    """Relative error of the input; None where there is no floating-point input, as for an embedding."""
    order: int

    @classmethod
    def of(cls, seen: SeenPlace) -> _Output | None:
        rows, entered = seen.rows("outputs"), seen.rows("inputs")
        if rows is None:
            return None
        before, after = rows
        if seen.place.is_head:
            before, after = before - before.mean(dim=1, keepdim=True), after - after.mean(dim=1, keepdim=True)
        error_in = _relative_error(*entered) if entered else None
        return cls(seen.place, before, after, _relative_error(before, after), error_in, seen.after.order)

    @property
    def jump(self) -> float:
        """The error that the module adds: errors of independent sources add up in squares."""
        entered = self.error_in or 0.0
        return 0.0 if self.error <= entered else math.sqrt((self.error - entered) * (self.error + entered))

    @property
    def evidence(self) -> str:
        before, after = (float(rows.var()) for rows in (self.before, self.after))
        entered = "" if self.error_in is None else f"{self.error_in:.3g} in, "
        return f"{self.place.name}: relative error {entered}{self.error:.3g} out, variance {before:.3g} -> {after:.3g}"

    @property
    def suspect(self) -> Suspect:
        return Suspect(self.place.blamed, self.jump, self.evidence)

    @property
    def metrics(self) -> dict[str, Any]:
        sides = (self.before, self.after)
        return {
            "module": self.place.name,
            "error": rounded(self.error),
            "error_in": rounded(self.error_in),
            "jump": rounded(self.jump),
            "mean": [rounded(float(rows.mean())) for rows in sides],
            "variance": [rounded(float(rows.var())) for rows in sides],
        }

    def correction(self) -> dict[str, Any] | None:
        """The factor of each channel that brings the output closest to what it was, and what it gains."""
        before, after = self.before[::2], self.after[::2]
        factors = (before * after).sum(dim=0) / (after * after).sum(dim=0).clamp(min=1e-30)
        before, after = self.before[1::2], self.after[1::2]
        error = min(float((before - after).square().sum()), float(before.square().sum()))
        if not error:
            return None
        gain = 1 - float((before - factors * after).square().sum()) / error
        return {
            "module": self.place.name,
            "predicted_gain": rounded(gain),
            "channels": len(factors),
            "factors": [rounded(float(factor)) for factor in (factors.min(), factors.median(), factors.max())],
        }


def _relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    return ratio(float((after - before).norm()), float(before.norm()))


def _not_finite(seen: Sequence[SeenPlace], outputs: Sequence[_Output]) -> dict[str, Any]:
    # What is huge somewhere overflows later. What no sample has is seen at the head alone, and may come from anywhere.
    broken = [each for each in seen if each.broken]
    first = broken[0].after.order if broken else 0
    huge = [output.suspect for output in outputs if output.jump > HUGE and output.order < first]
    return not_finite("outputs", (each.place.blamed for each in broken), "its output holds NaN or Inf", huge)


def _places(model: Any) -> Iterator[Place]:
    """The modules that have parameters of their own; a head that is tied to the embedding is blamed by its name."""
    from invarlock.api import find_weights, output_head
    from plugins_builtin.guards.activations import Place

    weights = {name: target for target in find_weights(model) for name in target.names}
    head = output_head(model)
    for name, module in model.named_modules():
        parameters = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if not name or not parameters:
            continue
        target = next((weights[parameter] for parameter in parameters if parameter in weights), None)
        family = family_of(target.role.value) if target else "other"
        yield Place(name, family, target.name if target and len(parameters) < 2 else name, module is head)
