"""The passes of a run over its final windows, step by step: no further than the limits take to be certain.

Both sides go through the same steps. The edited model is looked at after each; the baseline, which has to be ahead of
it, goes several steps at once, since an edit in place has to be taken back and made again in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from invarlock.core.errors import InputError
from invarlock.core.progress import Interval
from invarlock.datasets.layout import Windows
from invarlock.datasets.same_text import SameText
from invarlock.datasets.window_order import order_of
from invarlock.datasets.windows import unreadable
from invarlock.evaluation.confidence_sequence import sequence_level
from invarlock.evaluation.metric import Stopping
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.per_byte import over_same_text
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.results import Look, MoreBy
from invarlock.evaluation.stopping import Looked, can_step, look_at
from invarlock.evaluation.task import Judging
from invarlock.pipeline.own_tokenizer import PER_BYTE
from invarlock.pipeline.reference.kept import KEY, REMEDY, BaselinePass
from invarlock.pipeline.session import Baseline, WindowPair
from invarlock.pipeline.supply import Supply
from invarlock.pipeline.tasks import judging_of

FIRST = 4
"""Windows before the first look: with fewer the confidence sequence is infinite, or nearly so."""
GROWTH, STEP = 1.2, 2
"""Of the windows from a look to the next, and the fewest of a step. The more often one looks, the more often windows
that are not normal deceive: these are about as few looks as ``MOST_TIMES`` leaves."""
MOST_TIMES = 1.3
"""Times the windows that a decision needs that both sides measure together at most."""
FIRST_STREAMED, GROWTH_STREAMED = 16, 4.0
"""Each pass of a streamed model reads all of its weights, which takes as long as some windows do."""
PLANNED = 32
"""Windows that are measured at once where steps cannot be taken."""

BringBaseline = Callable[[], AbstractContextManager[torch.nn.Module]]
"""A block in which the baseline is in memory, and after which the edited model is as it was."""


@dataclass(frozen=True)
class Watching:
    """Onlookers of a first step, which preview windows go through."""

    taps: Sequence[Mapping[str, Any]] = ()
    taps_off: Callable[[], None] = lambda: None


NOBODY = Watching()


@dataclass(frozen=True)
class Measured:
    """Both passes, over the same windows, and the looks on the way."""

    baseline: PassResult
    edited: PassResult
    judging: Judging
    path: list[Look] = field(default_factory=list)


class Stepping:
    """The baseline's passes so far, and those of an edited model over the same windows."""

    def __init__(
        self, baseline: Baseline, windows: WindowPair, *, streamed: bool, held: BaselinePass | None = None
    ) -> None:
        """
        :param held: all steps of the baseline, of a reference.
        :raises InputError: they are others.
        """
        self._baseline, self._session, self.supply = baseline, baseline.session, Supply(baseline, windows)
        wanted, most = self._session.config.dataset.is_stepped, self.supply.most
        self.is_stepped = wanted and can_step(baseline.task)
        self.looks = [min(most, PLANNED) if wanted else most]
        """Numbers of windows after which both sides are compared."""
        if self.is_stepped:
            first, growth = (FIRST_STREAMED, GROWTH_STREAMED) if streamed else (FIRST, GROWTH)
            self.looks = looks(most, first=first, growth=growth, least=max(STEP, self._session.ranks.size))
        self._parts: list[PassResult] = [] if held is None else [*held.parts]
        self._records: list[TokenRecord | None] = [] if held is None else [*held.records]
        if held is not None and held.looks != self.looks:
            raise InputError(f"{KEY}: its steps end at other windows; {REMEDY}")

    @property
    def baseline_pass(self) -> PassResult:
        """Of the baseline, over all windows that it was run over yet."""
        return joined(self._parts, self.looks)

    @property
    def measured(self) -> int:
        """Windows that the baseline was run over yet."""
        return self.looks[len(self._parts) - 1]

    def begin(self, model: torch.nn.Module, watching: Watching) -> None:
        """Take the baseline's first step."""
        self._step_baseline(model, watching)

    def take_all(self, model: torch.nn.Module) -> None:
        """Take all further steps of a baseline that does not come back: as many as windows are planned for it."""
        self.looks = [look for look in self.looks if look <= PLANNED] or self.looks[:1]
        while len(self._parts) < len(self.looks):
            self._step_baseline(model)

    def complete(self, model: torch.nn.Module) -> BaselinePass:
        """Take all further steps of the baseline."""
        while len(self._parts) < len(self.looks):
            self._step_baseline(model)
        return BaselinePass(self.looks, self._parts, self._records, self.supply.made, self.supply.most)

    def judge(
        self,
        model: torch.nn.Module,
        watching: Watching,
        *,
        changed: bool,
        preview: Windows,
        same_text: SameText | None = None,
        bring_baseline: BringBaseline | None = None,
    ) -> Measured:
        """Run an edited model over the windows until the limits are certain, or there are none left.

        :param changed: whether any weight differs from the baseline's.
        :param preview: windows that guards observe, of the first step.
        :param same_text: final windows in place of the baseline's.
        :param bring_baseline: for further steps of the baseline; None where it took all of its own.
        """
        samples = None if same_text is None else same_text.windows
        parts: list[PassResult] = []
        path: list[Look] = []
        for step in range(len(self.looks)):
            if step == len(self._parts) and bring_baseline is not None:
                self._fetch(bring_baseline)
            final = self._part_of(step, samples)
            if step and unreadable(final, model) is not None:
                # The baseline wrote tokens that a smaller vocabulary lacks.
                break
            part, _ = self._baseline.run_pass(
                model,
                (preview if step == 0 else preview[:0], final),
                "edited pass",
                taps=watching.taps if step == 0 else (),
                reference=None if same_text else self._records[step],
                taps_off=(watching if step == 0 else NOBODY).taps_off,
            )
            parts.append(part)
            found = self._measured(parts, same_text)
            if found.judging.stopping is None:
                return found
            given = found.baseline, found.edited, found.judging, found.judging.stopping
            looked = self._session.ranks.from_first(partial(look_at, self._baseline.task, *given, changed=changed))
            if looked.look:
                path.append(looked.look)
                self._tell(looked, looked.look)
            if looked.decided:
                break
        return replace(found, path=path)

    def _step_baseline(self, model: torch.nn.Module, watching: Watching = NOBODY) -> None:
        step, preview = len(self._parts), self.supply.preview
        self.supply.write(model, self.looks[step])
        part, record = self._baseline.run_pass(
            model,
            (preview if step == 0 else preview[:0], self._part_of(step)),
            "baseline pass",
            taps=watching.taps,
            taps_off=watching.taps_off,
        )
        self._parts.append(part)
        self._records.append(record)

    def _tell(self, looked: Looked, look: Look) -> None:
        """Show how the interval has narrowed, and about how long the rest takes."""
        clock, most = self._session.clock, self.looks[-1]
        each = self._seconds_each + clock.stages["edited pass"] / look.windows
        left = max(0, min(looked.windows_needed(most), most) - look.windows)
        metric = self._baseline.task.metric
        name = "ratio" if metric.statistic == "ratio" else metric.kind.replace("_", " ")
        clock.on_progress(
            Interval(
                f"{name} {look.figure:.4g}, {look.low:.4g} to {look.high:.4g}, limit {looked.limit:.4g}, "
                f"{look.windows} of up to {most} windows, about {each * left:.0f} s"
            ),
            look.windows,
            most,
        )

    def _fetch(self, bring_baseline: BringBaseline) -> None:
        """The baseline's next steps, as many as suit."""
        to = self._session.ranks.from_first(self._ahead)
        with bring_baseline() as model:
            while self.looks[len(self._parts) - 1] < to:
                self._step_baseline(model)

    def _ahead(self) -> int:
        """Windows up to which the baseline is run before it goes again."""
        done, (following, *_) = self.looks[len(self._parts) - 1], self.looks[len(self._parts) :]
        if self._comes_dear(self.looks[-1] - done):
            return self.looks[-1]
        # The limits may be certain after one window more, and the edited model's next step then ends later.
        most = MOST_TIMES * 2 * (done + 1) - following
        return max([following, *(look for look in self.looks if look <= most)])

    def _comes_dear(self, windows: int) -> bool:
        """True if to take back the edit and make it again takes longer than to run the baseline over so many windows.

        It tells how far ahead the baseline is run, and nothing that is judged.
        """
        seconds = self._session.clock.stages
        return seconds["quantize"] + seconds["restore"] > self._seconds_each * windows

    @property
    def _seconds_each(self) -> float:
        """Of the baseline's pass, per window."""
        return self._session.clock.stages["baseline pass"] / (len(self.supply.preview) + self.measured)

    def _part_of(self, step: int, samples: Windows | None = None) -> Windows:
        return self.supply.between(self.looks[step - 1] if step else 0, self.looks[step], samples)

    def _measured(self, parts: Sequence[PassResult], same_text: SameText | None) -> Measured:
        """Both passes over the windows of the steps that the edited model took."""
        baseline, edited = joined(self._parts[: len(parts)], self.looks), joined(parts, self.looks)
        windows, level = self.looks[len(parts) - 1], sequence_level(self._session.config.eval.metric.ci_level)
        if same_text is not None:
            task = PER_BYTE[self._baseline.task.name]
            baseline, edited = over_same_text(baseline, edited, same_text.shared, task=task)
        stopping = Stopping(level, self.supply.documents, self._more_by) if self.is_stepped else None
        judging = judging_of(self._session.config, windows, self._baseline.reader, stopping=stopping)
        return Measured(baseline, edited, judging)

    @property
    def _more_by(self) -> MoreBy:
        """The key that asks for more windows than there are steps for, or more text."""
        if self.looks[-1] < self.supply.most:
            return "dataset.final_n"
        return "text" if self.supply.most < self._session.config.dataset.max_n else "dataset.max_n"


def joined(parts: Sequence[PassResult], looks: Sequence[int]) -> PassResult:
    """One result of the first steps.

    :param looks: numbers of windows at the ends of all steps.
    """
    whole = PassResult.joined(parts)
    if not whole.vectors or len(parts) == 1:
        return whole
    sizes = [end - start for start, end in pairwise([0, *looks[: len(parts)]])]
    return whole.reordered(order_of(sizes, [len(part.tokens) for part in parts]))


def looks(most: int, *, first: int, growth: float, least: int) -> list[int]:
    """Numbers of windows after which both sides are compared.

    :param least: fewest windows of a step: at least one for each process that shares it.
    """
    ends, following = [], max(first, least)
    while most - following >= least:
        ends.append(following)
        following += max(least, int(following * (growth - 1)))
    return [*ends, most]
