"""The spectrum of activations against the edge of noise, before and after the edit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.api import Guard
from plugins_builtin.guards.figures import TOP, Suspect, not_finite, not_measured, rounded, suspects
from plugins_builtin.guards.options import by_family, family_of, number, refuse, whole

if TYPE_CHECKING:
    import torch

    from plugins_builtin.guards.activations import SamplingTap, Seen
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
        names = ("epsilon_default", "epsilon_by_family", "margin", "deadband", "tokens", "seed")
        refuse(unknown, self.RETIRED, names)
        default = number("epsilon_default", epsilon_default, 0)
        self._epsilon = by_family("epsilon_by_family", epsilon_by_family or {}, default, 0)
        self._margin = number("margin", margin, 0)
        self._deadband = number("deadband", deadband, 0, 1)
        self._tokens = whole("tokens", tokens, 8)
        self._seed = whole("seed", seed, 0)
        self._places: dict[str, _Place] = {}

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> dict[str, SamplingTap]:
        from plugins_builtin.guards.activations import SamplingTap

        order = itertools.count()
        self._places = {place.module: place for place in _places(model)}
        return {
            name: SamplingTap(self._tokens, self._seed, order, inputs=True, thorough=place.is_head)
            for name, place in self._places.items()
        }

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        before, after = (context.get("observations", {}).get(side, {}) for side in ("baseline", "edited"))
        pairs = [_SeenPlace(self._places[name], before[name], seen) for name, seen in after.items() if name in before]
        pairs = sorted((pair for pair in pairs if pair.after.inputs), key=lambda pair: pair.after.order)
        if any(pair.before.all_finite and not pair.after.all_finite for pair in pairs) or any(map(_broken, pairs)):
            # What is not in the samples is seen at the head alone, and may come from anywhere.
            broken = dict.fromkeys(pair.place.fed_by for pair in pairs if _broken(pair))
            return not_finite("activations", list(broken), "its output holds NaN or Inf")
        changes = self._changes(pair for pair in pairs if pair.comparable)
        if not changes:
            return not_measured("no activations of the same tokens before and after")
        return self._result(changes, [pair.place.module for pair in pairs if not pair.comparable])

    def _changes(self, pairs: Iterable[_SeenPlace]) -> list[_PlaceChange]:
        from plugins_builtin.guards.rmt.spikes import compare

        changes: list[_PlaceChange] = []
        for pair in pairs:
            spectra = compare(*pair.rows, margin=self._margin, deadband=self._deadband)
            crossed = (spectra.lost + spectra.gained) / max(1, *spectra.counts)
            most = max(spectra.turned, abs(spectra.energy_ratio - 1), crossed)
            beyond = most / max(self._epsilon[pair.place.family], 1e-9)
            changes.append(
                _PlaceChange(pair.place, spectra, beyond, beyond - changes[-1].beyond if changes else beyond)
            )
        return changes

    def _result(self, changes: Sequence[_PlaceChange], unmeasured: Sequence[str]) -> dict[str, Any]:
        ranked = sorted(changes, key=lambda change: -change.beyond)
        deciding = next((change for change in changes if change.place.is_head), ranked[0])
        first = max(changes, key=lambda change: change.jump)
        warnings = []
        if deciding.beyond > 1:
            warnings.append(f"{deciding.evidence}; the change is largest after {first.place.fed_by}")
        return {
            "passed": True,
            "action": "warn" if warnings else "continue",
            "message": "; ".join(warnings) or deciding.evidence,
            "warnings": warnings,
            "metrics": {
                "measured": True,
                "places": len(changes),
                "not_measured": list(unmeasured[:TOP]),
                "beyond_epsilon": sum(change.beyond > 1 for change in changes),
                "decided_by": deciding.metrics,
                "modules": [change.metrics for change in ranked[:TOP] if change.beyond > NOTHING],
                "suspects": suspects(
                    Suspect(change.place.fed_by, change.jump, change.evidence)
                    for change in changes
                    if change.jump > NOTHING
                ),
            },
        }


@dataclass(frozen=True)
class _Place:
    """A module whose input is looked at."""

    module: str
    family: str
    fed_by: str
    """Common parent of the modules between the place before and this one."""
    is_head: bool = False


@dataclass(frozen=True)
class _SeenPlace:
    """Samples at a place on both sides."""

    place: _Place
    before: Seen
    after: Seen

    @property
    def comparable(self) -> bool:
        before = self.before.inputs
        return before is not None and before.comparable(self.after.inputs) and before.finite

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.before.inputs
        assert self.after.inputs
        return self.before.inputs.rows, self.after.inputs.rows


@dataclass(frozen=True)
class _PlaceChange:
    place: _Place
    spectra: Spectra
    beyond: float
    """Change in units of its epsilon."""
    jump: float
    """Rise of ``beyond`` over the place before."""

    @property
    def evidence(self) -> str:
        before, after = self.spectra.counts
        return (
            f"input of {self.place.module}: {self.spectra.turned:.1%} of the signal energy lies in lost directions, "
            f"total energy {self.spectra.energy_ratio - 1:+.1%}, {before} -> {after} directions beyond the noise edge"
        )

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "module": self.place.module,
            "family": self.place.family,
            "beyond_edge": list(self.spectra.counts),
            "energy": [rounded(energy) for energy in self.spectra.energies],
            "energy_ratio": rounded(self.spectra.energy_ratio),
            "turned": rounded(self.spectra.turned),
            "lost": self.spectra.lost,
            "gained": self.spectra.gained,
            "edge": rounded(self.spectra.edge),
        }


def _broken(pair: _SeenPlace) -> bool:
    """Whether NaN or Inf came into the sample with the edit."""
    before, after = pair.before.inputs, pair.after.inputs
    return bool(before and after and before.finite and not after.finite)


def _places(model: Any) -> list[_Place]:
    """The first weight of attention, of the feed-forward and of neither in each block, and the output head."""
    from invarlock.api import block_of, find_weights, output_head

    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    first = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    found: dict[tuple[str | None, str], _Place] = {}
    since = [names[first]] if first in names else []
    for target in find_weights(model):
        if target.role.value in ("router", "embedding", "head") or target.layout.name == "CONV":
            continue
        name, family = names[target.module], family_of(target.role.value)
        key = block_of(modules, name), family
        if key not in found:
            found[key] = _Place(name, family, _common(since) or name)
            since = []
        since.append(name)
    head = names.get(output_head(model))
    return [*found.values(), *([_Place(head, "embed", _common(since) or head, is_head=True)] if head else [])]


def _common(names: Sequence[str]) -> str:
    """The module that all of them are in, or the one itself."""
    if not names:
        return ""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda entries: len(set(entries)) == 1, zip(*parts, strict=False))
    return ".".join(entries[0] for entries in shared)
