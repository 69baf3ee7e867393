"""Tasks: how the inputs of a kind of models are made, what is compared of its outputs, and what decides.

This module imports no torch, so that tasks can be listed without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.core.errors import UsageError
from invarlock.evaluation.results import FigureResult, MetricResult, Statistic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from invarlock.core.records import Samples
    from invarlock.datasets.conversations import ChatTemplate
    from invarlock.datasets.layout import Windows
    from invarlock.datasets.windows import Dataset
    from invarlock.evaluation.metric import Stopping
    from invarlock.evaluation.passes import PassResult
    from invarlock.evaluation.results import DivergenceResult
    from invarlock.models.facts import ModelClass, Predicted

    Vectors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Metric:
    """A primary metric: its name, how it is computed from what is measured of each window, and the limit."""

    kind: str
    """Its name in the report, as ``eval.metric.kind`` takes it: "cosine_distance"."""
    statistic: Statistic
    limit: float | None = None
    """Largest value to accept, where ``eval.metric.limit`` is not set; None for ratios: ``eval.max_pm_ratio``."""

    def check(self, wanted: str, task: str) -> None:
        """:raises UsageError: ``eval.metric.kind`` asks for another metric than the one of the task."""
        if wanted not in ("auto", self.kind):
            raise UsageError(f"eval.metric.kind: {wanted} does not apply to {task} models; use {self.kind} or auto")


@dataclass(frozen=True)
class Judging:
    """Limits and statistics of a comparison, from the sections ``eval`` and ``dataset`` of the configuration."""

    ratio: float
    limit: float | None
    level: float
    reps: int
    seed: int
    improving: bool
    windows: int
    """Number of windows that decide."""
    stopping: Stopping | None = None
    """Of windows that are measured until the limits are certain; None for a number fixed before."""
    tokenizer: Any = None
    """The one that windows were made with; None where no text was read."""


@dataclass(frozen=True)
class Compared:
    """Results of comparing two passes."""

    primary: MetricResult
    passes: tuple[PassResult, PassResult]
    """The passes window by window, as the primary metric is computed from them."""
    predictions: DivergenceResult | None = None
    figures: Sequence[FigureResult] = ()


class Task(ABC):
    """A kind of models. ``LanguageTask`` and ``VectorTask`` leave little of it to write."""

    name: ClassVar[str]
    metric: ClassVar[Metric]
    made_up: str = ""
    """The samples where there is no data: "random tokens"; empty where the baseline writes its own text."""
    made_up_media: str = ""
    """The part of the samples that is made up even where there is text: "random pixels"."""
    reads: ClassVar[frozenset[str]] = frozenset({"text"})
    """Columns of a dataset that it can use, of which one has to be there; it is given plain text unless it reads more:
    "text_pair", "image", "audio"."""
    towers: frozenset[str] = frozenset()
    """Parts beside the text model that the samples exercise: "vision", "audio"."""

    @abstractmethod
    def owns(self, model_class: ModelClass) -> bool:
        """True for the models of this kind, by the names of their classes."""

    def needs_tokenizer(self, dataset: Dataset) -> bool:
        """True if no windows can be made without the tokenizer."""
        return not dataset.is_generated

    @abstractmethod
    def make_windows(
        self, model: nn.Module, dataset: Dataset, tokenizer: Any, documents: Samples | None
    ) -> tuple[Windows, Windows]:
        """The preview windows, which guards see, and the final ones, which decide.

        :param documents: the text of the dataset, or records where the task reads more; None where there is no data.
        """

    @abstractmethod
    def measure(self, model: nn.Module, preview: Windows, final: Windows, **how: Any) -> PassResult:
        """Run a model over windows once; ``how`` is as :func:`invarlock.evaluation.passes.measure` takes it."""

    @abstractmethod
    def compare(self, baseline: PassResult, edited: PassResult, judging: Judging) -> Compared:
        """Hold an edited model against the baseline."""


class LanguageTask(Task):
    """Models that give each token of a text a probability: decided by the ratio of the perplexities."""

    predicted: ClassVar[Predicted]

    def make_windows(
        self,
        model: nn.Module,
        dataset: Dataset,
        tokenizer: Any,
        documents: Samples | None,
        *,
        chat: ChatTemplate | None = None,
    ) -> tuple[Windows, Windows]:
        """
        :param chat: the template that renders some of the windows; only a causal task is given one.
        """
        from invarlock.datasets.windows import make_windows

        return make_windows(dataset, model, tokenizer, task=self.predicted, documents=documents, chat=chat)

    def measure(self, model: nn.Module, preview: Windows, final: Windows, **how: Any) -> PassResult:
        from invarlock.evaluation.passes import measure

        return measure(model, preview, final, task=self.predicted, **how)

    def compare(self, baseline: PassResult, edited: PassResult, judging: Judging) -> Compared:
        from invarlock.evaluation.divergence import compare_predictions

        primary = _primary(self.metric, (baseline, edited), judging, judging.ratio)
        predictions = compare_predictions(
            baseline, edited, ratio=judging.ratio, improving=judging.improving, stopping=judging.stopping
        )
        return Compared(primary, (baseline, edited), predictions)


class VectorTask(Task):
    """Models that make a vector of each sample, by default of a text: an embedding, or a score for each label.

    A window may hold several samples: the primary metric is over their differences, its interval over windows.
    """

    made_up = "random tokens"

    def make_windows(
        self, model: nn.Module, dataset: Dataset, tokenizer: Any, documents: Samples | None
    ) -> tuple[Windows, Windows]:
        from invarlock.datasets.samples import make_samples

        return make_samples(dataset, model, tokenizer, documents)

    @abstractmethod
    def vectors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Vectors (samples, numbers) that the model makes of a batch; more than one for each sample go by their names.

        :param batch: arguments of the model's forward, on its device.
        """

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of vectors of each sample of a batch, int64 (samples,)."""
        import torch

        return torch.ones(len(next(iter(batch.values()))), dtype=torch.int64)

    def differences(self, before: Vectors, after: Vectors) -> NDArray[np.float64]:
        """Difference of each sample, (samples,): by default the cosine distance, of the part that moved most."""
        from invarlock.evaluation.vectors import cosine_distances

        return cosine_distances(before, after)

    def figures(self, before: Vectors, after: Vectors, judging: Judging) -> Sequence[FigureResult]:
        """Further figures, each held against a limit of its own."""
        return ()

    def measure(self, model: nn.Module, preview: Windows, final: Windows, **how: Any) -> PassResult:
        from invarlock.evaluation.vectors import measure_vectors

        return measure_vectors(model, preview, final, self.vectors, self.counts, **how)

    def compare(self, baseline: PassResult, edited: PassResult, judging: Judging) -> Compared:
        passes = self.by_window(baseline, edited, judging.windows)
        limit = self.metric.limit if judging.limit is None else judging.limit
        figures = self.figures(baseline.vectors, edited.vectors, judging)
        return Compared(_primary(self.metric, passes, judging, limit), passes, figures=figures)

    def by_window(self, baseline: PassResult, edited: PassResult, windows: int) -> tuple[PassResult, PassResult]:
        """The differences of both passes from the baseline's vectors, summed over the samples of each window."""
        from invarlock.evaluation.vectors import by_window

        before, after = baseline.vectors, edited.vectors
        return by_window(baseline, self.differences(before, before), self.differences(before, after), windows)


def _primary(
    metric: Metric, passes: tuple[PassResult, PassResult], judging: Judging, limit: float | None
) -> MetricResult:
    from invarlock.evaluation.metric import compare

    return compare(
        *passes,
        kind=metric.kind,
        statistic=metric.statistic,
        limit=judging.ratio if limit is None else limit,
        level=judging.level,
        reps=judging.reps,
        seed=judging.seed,
        stopping=judging.stopping,
    )
