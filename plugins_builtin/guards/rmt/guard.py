"""The spectrum of activations against the edge of noise, before and after the edit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.api import Guard
from plugins_builtin.guards.figures import TOP, Suspect, measured, not_finite, not_measured, rounded, suspects
from plugins_builtin.guards.options import by_family, family_of, number, refuse, whole

if TYPE_CHECKING:
    from plugins_builtin.guards.activations import Place, SamplingTap, SeenPlace
    from plugins_builtin.guards.rmt.spikes import Spectra


NOTHING = 0.01
"""Share of its epsilon below which a change is not reported."""


class RMTGuard(Guard):
    """Compares how activations vary together before and after the edit: random matrix theory tells signal from noise.

    It looks at what goes into attention and into the feed-forward of every block, and into the output head: of a few
    tokens, the same ones on both sides, standardized with the baseline's mean and deviation. Eigenvalues of their
    correlation matrix beyond the Marchenko-Pastur edge are signal (formulas: ``plugins_builtin.guards.rmt.spikes``).
    For every place: the number of these eigenvalues before and after, their energy, and the share of the baseline's
    energy that the edited ones no longer span.

    It warns when the input of the output head has changed by more than its limit, and never does more: a rotated
    residual stream changes everything here and no prediction. A change that does not reach the head (norms folded into
    the next layer) is in the metrics and no warning. Without a head of its own to look at, the place that
    changed most decides. NaN or Inf that the baseline has not aborts.

    Options:

    ``epsilon_default`` (0.04), ``epsilon_by_family`` ({})
        Largest change of a place, for ffn, attn, other, and for embed, which is the output head and so decides. Held
        against it, up or down: the share of the energy that has turned away, the relative change of the energy, the
        share of eigenvalues lost or gained. Energies are squares: 0.04 is a relative error of 0.2, the size at which
        rounding stops being usable (``family_caps`` of ``spectral``).
    ``margin`` (2.02)
        How far beyond the edge a signal begins, as a quantile of the Tracy-Widom law: 2.02 is the one that the largest
        eigenvalue of noise exceeds in 1 % of cases. In InvarLock 0.3 it was a factor.
    ``deadband`` (0.1)
        An eigenvalue counts as lost or gained only if it was, or is, beyond the edge by this share of it. One right at
        the edge crosses it at the slightest rounding, and all of them move by about the relative error, 0.1 at 4 bits.
    ``tokens`` (64)
        How many tokens to look at: enough for the dozen or so directions of signal that layers have, and the time grows
        with their cube, 1 ms a place for 64.
    ``seed`` (0)
        Of the choice of tokens.
    """

    name = "rmt"

    RETIRED: ClassVar[Mapping[str, str]] = {
        "activation": "activations of the preview windows are always measured; tokens sets how many",
        "activation_required": "without activations the guard reports that it did not measure",
        "correct": "the guard never changes a model; there is nothing to correct",
        "epsilon": "use epsilon_default, or epsilon_by_family",
        "estimator": "all eigenvalues are computed; there is nothing to iterate",
        "q": "the ratio of features to tokens follows from the model; tokens changes it",
    }

    def __init__(
        self,
        epsilon_default: float = 0.04,
        epsilon_by_family: Mapping[str, float] | None = None,
        margin: float = 2.02,
        deadband: float = 0.1,
        tokens: int = 64,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        refuse(type(self), unknown, self.RETIRED)
        default = number("epsilon_default", epsilon_default, 0)
        self._epsilon = by_family("epsilon_by_family", epsilon_by_family or {}, default, 0)
        self._margin = number("margin", margin, 0)
        self._deadband = number("deadband", deadband, 0, 1)
        self._tokens = whole("tokens", tokens, 8)
        self._seed = whole("seed", seed, 0)
        self._places: dict[str, Place] = {}

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> dict[str, SamplingTap]:
        from plugins_builtin.guards.activations import taps

        self._places = {place.name: place for place in _places(model)}
        return taps(self._places.values(), self._tokens, self._seed)

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        from plugins_builtin.guards.activations import seen_places

        seen = seen_places(context, self._places, "inputs")
        if any(each.harmed for each in seen):
            # What is not in the samples is seen at the head alone, and may come from anywhere.
            broken = (each.place.blamed for each in seen if each.broken)
            return not_finite("activations", broken, "its output holds NaN or Inf")
        changes = self._changes(seen)
        if not changes:
            return not_measured("no activations of the same tokens before and after")
        return self._result(changes, seen)

    def _changes(self, seen: Sequence[SeenPlace]) -> list[_PlaceChange]:
        from plugins_builtin.guards.rmt.spikes import compare

        changes: list[_PlaceChange] = []
        for place, rows in ((each.place, each.rows("inputs")) for each in seen):
            if rows is not None:
                spectra = compare(*rows, margin=self._margin, deadband=self._deadband)
                crossed = (spectra.lost + spectra.gained) / max(1, *spectra.counts)
                most = max(spectra.turned, abs(spectra.energy_ratio - 1), crossed)
                beyond = most / max(self._epsilon[place.family], 1e-9)
                jump = beyond - changes[-1].beyond if changes else beyond
                changes.append(_PlaceChange(place, spectra, beyond, jump))
        return changes

    def _result(self, changes: Sequence[_PlaceChange], seen: Sequence[SeenPlace]) -> dict[str, Any]:
        ranked = sorted(changes, key=lambda change: -change.beyond)
        deciding = next((change for change in changes if change.place.is_head), ranked[0])
        first = max(changes, key=lambda change: change.jump)
        message = deciding.evidence
        if deciding.beyond > 1:
            message += f"; the change is largest after {first.place.blamed}"
        blamed = (Suspect(each.place.blamed, each.jump, each.evidence) for each in changes if each.jump > NOTHING)
        metrics = {
            "places": len(changes),
            "beyond_epsilon": sum(change.beyond > 1 for change in changes),
            "decided_by": deciding.metrics,
            "modules": [change.metrics for change in ranked[:TOP] if change.beyond > NOTHING],
            "suspects": suspects(blamed),
        }
        compared = {change.place for change in changes}
        unmeasured = [each.place.name for each in seen if each.place not in compared]
        return measured(message, [message] if deciding.beyond > 1 else [], metrics, unmeasured)


@dataclass(frozen=True)
class _PlaceChange:
    place: Place
    spectra: Spectra
    beyond: float
    """Change in units of its epsilon."""
    jump: float
    """Rise of ``beyond`` over the place before."""

    @property
    def evidence(self) -> str:
        before, after = self.spectra.counts
        return (
            f"input of {self.place.name}: {self.spectra.turned:.1%} of the signal energy lies in lost directions, "
            f"total energy {self.spectra.energy_ratio - 1:+.1%}, {before} -> {after} directions beyond the noise edge"
        )

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "module": self.place.name,
            "family": self.place.family,
            "beyond_edge": list(self.spectra.counts),
            "energy": [rounded(energy) for energy in self.spectra.energies],
            "energy_ratio": rounded(self.spectra.energy_ratio),
            "turned": rounded(self.spectra.turned),
            "lost": self.spectra.lost,
            "gained": self.spectra.gained,
            "edge": rounded(self.spectra.edge),
        }


def _places(model: Any) -> list[Place]:
    """The first weight of attention, of the feed-forward and of neither in each block, and the output head.

    What changes there comes from the modules since the place before: the one that holds them all is blamed.
    """
    from invarlock.api import block_of, find_weights, input_embeddings, output_head
    from plugins_builtin.guards.activations import Place

    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    first = input_embeddings(model)
    found: dict[tuple[str | None, str], Place] = {}
    since = [names[first]] if first in names else []
    for target in find_weights(model):
        if target.role.value in ("router", "embedding", "head") or target.layout.name == "CONV":
            continue
        name, family = names[target.module], family_of(target.role.value)
        key = block_of(modules, name), family
        if key not in found:
            found[key] = Place(name, family, _common(since) or name)
            since = []
        since.append(name)
    head = names.get(output_head(model))
    return [*found.values(), *([Place(head, "embed", _common(since) or head, is_head=True)] if head else [])]


def _common(names: Sequence[str]) -> str:
    """The module that all of them are in, or the one itself; empty for none."""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda entries: len(set(entries)) == 1, zip(*parts, strict=False))
    return ".".join(entries[0] for entries in shared)
