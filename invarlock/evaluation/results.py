"""Results of comparing two passes, as the report holds them. Nothing heavy is imported: renderers read them, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from invarlock.core.results import Action

Unit = Literal["token", "byte", "sample"]
Statistic = Literal["ratio", "mean", "share"]
"""Of two passes: the ratio of exp of the mean losses; the mean difference; the share of samples that differ."""
IntervalKind = Literal["fixed", "sequence"]
MoreBy = Literal["dataset.final_n", "dataset.max_n", "text"]
Number = float | Literal["nan", "inf", "-inf"]
"""JSON has no number that is not finite."""


@dataclass(frozen=True)
class Look:
    """The primary metric after so many windows: its figure, and both ends of its confidence sequence."""

    windows: int
    figure: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Bounds:
    """Both ends of the confidence sequence of a mean or, of a percentile, of the share of what lies above its limit."""

    low: Number
    high: Number
    limit: Number
    """The largest mean, or the largest share: 5 % of a 95th percentile."""
    windows: int | None = None
    """So many would put the limit outside, at the spread that was seen; None where it is, or where none would."""

    @property
    def side(self) -> int:
        """Where the limit lies for certain: -1 above both ends, 1 below them, 0 between them."""
        low, high, limit = map(float, (self.low, self.high, self.limit))
        return 1 if low > limit else -1 if high <= limit else 0


@dataclass(frozen=True)
class Undecided:
    """An interval that straddles its limit: the ratios that so many windows tell from it, and how many could decide.

    Four of five runs over as many windows find a ratio of at most ``below``, or of at least ``above``, to be on its
    side of the limit; None of a limit on predictions.
    """

    below: Number | None
    above: Number | None
    windows: int | None
    """So many tell the figure that was measured from the limit, at the spread that was seen; None where none do."""
    message: str
    """With the option that would decide, ready to paste."""
    option: MoreBy = "dataset.final_n"
    """The key that asks for more windows, or what there has to be more of."""

    @property
    def remedy(self) -> str:
        """The way to a decision, for a message."""
        if self.windows is None:
            return "it is at the limit"
        if self.option == "text":
            return f"about {self.windows} would decide: give more text (dataset.path)"
        return f"--set {self.option}={self.windows} would decide"


@dataclass(frozen=True)
class MetricResult:
    """Result of the primary metric; None stands for what was not measured.

    ``ratio`` is edited over baseline perplexity, ``ci`` its confidence interval, whose upper end is held against
    ``limit``. ``tokens`` counts scored tokens. All perplexities, and so the ratio, its interval and the limit, are per
    ``unit``: exp of the loss in nats per token or, where two tokenizers split the same text, per byte of UTF-8.

    Of any other ``statistic`` than the ratio, ``edited`` is the figure that ``ci`` is about: the mean over samples of a
    distance from the baseline, or the share of samples that differ. ``baseline`` is then 0, and ``tokens`` counts
    samples.
    """

    kind: str
    """Its name: "perplexity", "cosine_distance"."""
    baseline: Number | None
    edited: Number | None
    ratio: Number | None
    ci: tuple[Number, Number] | None
    ci_level: float
    windows: int
    tokens: int
    limit: float
    action: Action
    message: str
    unit: Unit = "token"
    statistic: Statistic = "ratio"
    undecided: Undecided | None = None
    """None where the interval is on one side of the limit, or was not measured."""
    interval: IntervalKind = "fixed"
    """Whether ``ci`` holds for the number of windows alone, or however often one looked on the way to it."""

    @property
    def name(self) -> str:
        """Its name in words."""
        return self.kind.replace("_", " ")

    @property
    def figure(self) -> Number | None:
        """The number that is held against the limit, by its interval."""
        return self.edited if self.is_distance else self.ratio

    @property
    def is_distance(self) -> bool:
        """True where samples are compared with the baseline's, and not the perplexity of two models."""
        return self.statistic in ("mean", "share")


@dataclass(frozen=True)
class FigureResult:
    """A further figure of the outputs, and its limit; None stands for what was not measured, or has no limit."""

    name: str
    value: Number | None
    unit: str
    """As "nats", or "%" for a share."""
    limit: float | None
    action: Action
    message: str

    @classmethod
    def held(cls, name: str, value: float | None, unit: str, limit: float, *, rejects: bool = False) -> FigureResult:
        """A figure held against its limit.

        :param value: None where the edited model gives what is not finite, or there is too little to compare.
        :param rejects: above the limit the edit is rejected; else there is a warning.
        """
        scale = 100 if unit == "%" else 1
        shown = "not measured" if value is None else f"{value * scale:.4g} {unit}"
        if value is None or value <= limit:
            return cls(name, value, unit, limit, Action.CONTINUE, f"{name} {shown}")
        action = Action.ROLLBACK if rejects else Action.WARN
        return cls(name, value, unit, limit, action, f"{name} {shown}, above {limit * scale:.4g} {unit}")


@dataclass(frozen=True)
class PredictionLimits:
    """The largest figures to accept: above ``flips`` or ``broken`` there is a warning, above any other a rollback."""

    kl_mean: float
    kl_p95: float
    kl_p99: float
    window_p95: float
    flips: float
    broken: float


@dataclass(frozen=True)
class DivergenceResult:
    """The edited model's predictions against the baseline's, token by token; None stands for what was not measured.

    Divergences are Kullback-Leibler divergences of the next-token distribution from the baseline's, in nats, over
    scored tokens. They are lower bounds: all but the baseline's likeliest tokens count as one. Tokens that are not
    finite count in both ``flips`` and ``broken``.
    """

    kl_mean: float | None
    kl_p95: float | None
    kl_p99: float | None
    window_p95: float | None
    """95th percentile over windows of the rise of the loss, nats per token."""
    flips: float | None
    """Share of the tokens whose likeliest prediction is another one."""
    broken: float | None
    """Share of the tokens whose divergence is above log 2."""
    margin_baseline: float | None
    """Mean margin of the baseline's likeliest token over the runner-up, nats of log probability."""
    margin_loss: float | None
    """Part of it that the edited model lost: all of it and more where tokens flip."""
    limits: PredictionLimits | None
    action: Action
    message: str
    bounds: Mapping[str, Bounds] | None = None
    """By the name of the figure; None where the figures are held against their limits as they are."""
    undecided: Undecided | None = None
    """Of bounds that hold a limit between them, where no figure is above its limit for certain."""


@dataclass(frozen=True)
class NoiseRun:
    """The baseline against itself, computed in another way: what differs is the machine's doing."""

    how: str
    """As "in bfloat16"."""
    figure: float
    """Of the primary metric: of a ratio, the absolute value of its logarithm."""
    kl_mean: float | None
    """Nats per token, as of an edit; None where no tokens are predicted."""
    flips: float | None


@dataclass(frozen=True)
class NoiseResult:
    """The noise floor of a baseline, and whether an edit is above it."""

    runs: list[NoiseRun]
    below: bool | None
    """True where neither the primary metric nor the mean KL divergence of the edit is above all of the runs; None where
    they were not measured."""
    message: str
