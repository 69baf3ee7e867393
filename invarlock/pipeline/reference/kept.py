"""A reference: what a baseline measured, kept so that many subjects are judged against one pass of it.

It is read as a stranger's: shapes and numbers are checked, and it is refused where anything that it rests on differs.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invarlock.checkpoints import tensor_tree
from invarlock.checkpoints.checksums import digest_of
from invarlock.checkpoints.tensor_tree import UnstorableError
from invarlock.core.errors import InputError, UsageError, named_by, one_line
from invarlock.core.paths import absolute
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.datasets.windows import unreadable
from invarlock.distributed.process_group import Ranks
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.results import NoiseRun
from invarlock.evaluation.task import LanguageTask, Task
from invarlock.models.facts import Predicted, vocabulary_of
from invarlock.pipeline.reference.tree import (
    FORGED,
    digests_of,
    experts_of,
    noise_of,
    pass_of,
    record_of,
    sensitivities_of,
    tree_of_sensitivities,
    tree_of_step,
    tree_of_windows,
    whole,
    windows_of,
)
from invarlock.plugins.manager import GuardSlot
from invarlock.plugins.observation import Observation
from invarlock.plugins.plugin import Origin
from invarlock.quantization.selection import find_weights
from invarlock.search.fisher import BaselineFisher, Fisher

FORMAT_VERSION, FILE = "reference-v1", "reference.json"
KEY = "--reference"
REMEDY = "make it again with invarlock reference"
OF_EARLIER_BUILDS = BaselineFisher(None, f"the reference holds no sensitivities; {REMEDY}")
DIGITS = 32
"""Of the shortest digest: it says nothing to a reader."""
Facts = Mapping[str, Any]
"""Plain data, by names for messages."""


@dataclass(frozen=True, eq=False)
class BaselinePass:
    """A pass of the baseline, step by step, and what was seen on the way."""

    looks: list[int]
    """Number of windows at the end of each step."""
    parts: Sequence[PassResult]
    records: Sequence[TokenRecord | None]
    made: int
    """Final windows that there are; some are beyond the last step where no steps can be taken."""
    most: int
    """Final windows that there could be."""
    observed: list[Observation] = field(default_factory=list)
    """Of each guard; empty as long as it is a reference's."""
    never_ran: frozenset[str] = frozenset()
    """Modules that no preview window reaches."""
    experts: Sequence[Tensor | None] = ()
    """Of each layer of experts, which of them received a token of the preview windows; None if not known."""

    @property
    def record(self) -> TokenRecord | None:
        """Of all steps; None where no tokens are predicted."""
        records = [record for record in self.records if record]
        if not records:
            return None
        tokens, log_probs = (torch.cat([getattr(each, name) for each in records]) for name in ("tokens", "log_probs"))
        return TokenRecord(tokens, log_probs, records[0].vocabulary)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(int(part.tokens.sum()) for part in self.parts)


@dataclass(frozen=True, eq=False)
class Reference:
    """Windows and measurements of a baseline, and the facts that they rest on."""

    rests_on: Facts
    windows: tuple[Windows, Windows]
    """Preview and final ones."""
    measured: BaselinePass
    guards: Sequence[Mapping[str, Any]] = ()
    """Of each guard whose observations are kept: who it is, and the result of each tap."""
    noise: Sequence[NoiseRun] = ()
    sensitivities: BaselineFisher = OF_EARLIER_BUILDS
    """For shares of whatever weights a subject changes."""
    by_mark: Mapping[str, str] = field(default_factory=dict)
    """As of ``Prints``; empty in references of earlier builds."""
    created: str = ""
    digest: str = ""
    """SHA-256 of its list of digests, empty until it is written or read."""
    folder: Path = Path()

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def for_one(cls, folder: Path | None, ranks: Ranks) -> Reference | None:
        """The reference of a run, where it has one.

        :raises UsageError: several processes share the run, and each would need its part of the predictions.
        """
        if folder is not None and ranks.size > 1:
            raise UsageError(f"{KEY}: it is for one process, and {ranks.size} share this run; leave it out")
        return None if folder is None else cls.read(folder)

    @classmethod
    @named_by(KEY)
    def read(cls, folder: Path) -> Reference:
        """:raises InputError: it is missing, damaged, or of another form."""
        try:
            tree, digest = tensor_tree.read(folder, FILE)
            return cls._of_tree(tree, digest, folder)
        except FORGED as error:
            raise InputError(f"{absolute(folder)} is damaged: {one_line(error)}; {REMEDY}") from error
        except InputError as error:
            raise InputError(f"{error}; {REMEDY}") from error

    def write(self, folder: Path) -> str:
        """Write it to a new folder; returns its digest.

        :raises InputError: what the baseline measured can be no reference: it holds NaN or infinity.
        """
        tree = self._tree()
        try:
            self._of_tree(tree, "", folder)
        except FORGED as error:
            raise InputError(f"what the baseline measures can be no reference: {one_line(error)}") from error
        return tensor_tree.write(folder, FILE, tree)

    def _tree(self) -> dict[str, Any]:
        measured = self.measured
        return {
            "format_version": FORMAT_VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rests_on": dict(self.rests_on),
            "windows": [tree_of_windows(part) for part in self.windows],
            "made": measured.made,
            "most": measured.most,
            "steps": [
                tree_of_step(*step) for step in zip(measured.looks, measured.parts, measured.records, strict=True)
            ],
            "never_ran": sorted(measured.never_ran),
            "experts": list(measured.experts),
            "guards": [dict(guard) for guard in self.guards],
            "noise": [asdict(run) for run in self.noise],
            "sensitivities": tree_of_sensitivities(self.sensitivities),
            "by_mark": dict(self.by_mark),
        }

    @classmethod
    def _of_tree(cls, tree: Mapping[str, Any], digest: str, folder: Path) -> Reference:
        if tree["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format_version is not {FORMAT_VERSION}")
        preview, final = (windows_of(part) for part in tree["windows"])
        measured = BaselinePass(
            [whole(step["look"]) for step in tree["steps"]],
            [pass_of(step["pass"], final) for step in tree["steps"]],
            [record_of(step["record"], step["pass"]["tokens"]) for step in tree["steps"]],
            whole(tree["made"]),
            whole(tree["most"]),
            never_ran=frozenset(map(str, tree["never_ran"])),
            experts=experts_of(tree["experts"]),
        )
        guards = [{**guard, "taps": dict(guard["taps"])} for guard in tree["guards"]]
        noise = [noise_of(run) for run in tree["noise"]]
        known = sensitivities_of(tree["sensitivities"]) if "sensitivities" in tree else OF_EARLIER_BUILDS
        by_mark = digests_of(tree.get("by_mark", {}))
        facts, created = dict(tree["rests_on"]), str(tree["created"])
        return cls(facts, (preview, final), measured, guards, noise, known, by_mark, created, digest, folder)

    # -- use -----------------------------------------------------------------------------------------------------------

    @named_by(KEY)
    def check(self, facts: Facts, task: Task, model: nn.Module) -> None:
        """:raises InputError: the baseline that is here differs from the one that was measured, or cannot be it."""
        if differing := list(_differing(self.rests_on, facts)):
            raise InputError(f"{absolute(self.folder)} was made with another {', '.join(differing)}; {REMEDY}")
        wrong = [unreadable(part, model) for part in self.windows]
        predicted = task.predicted if isinstance(task, LanguageTask) else None
        if not self._fits(predicted, vocabulary_of(model)):
            wrong.append(f"it does not hold a pass of a {task.name} model over its windows")
        if not _of_weights(self.sensitivities.fisher or {}, model):
            wrong.append("its sensitivities are of other weights")
        if reason := next(filter(None, wrong), None):
            raise InputError(f"{absolute(self.folder)} is damaged: {reason}; {REMEDY}")

    def _fits(self, predicted: Predicted | None, vocabulary: int) -> bool:
        """True if the steps follow each other, and score the tokens that the final windows' labels say.

        :param predicted: None where no tokens are predicted.
        :param vocabulary: number of tokens that the model knows.
        """
        measured, (preview, final) = self.measured, self.windows
        seq2seq = [part.decoder_input_ids is not None for part in (preview, final)]
        if seq2seq != [predicted == "seq2seq"] * 2 or not measured.looks[-1] <= measured.made <= measured.most:
            return False
        if predicted is None:
            return not any(measured.records) and len(final) % measured.made == 0
        known = min([vocabulary, *(record.vocabulary for record in measured.records if record)])
        if any(int(part.labels.max()) >= known for part in self.windows):
            return False
        labels = final.labels[:, 1:] if predicted == "causal" else final.labels
        scored = (labels != UNSCORED).sum(dim=1).numpy()
        starts = [0, *measured.looks]
        steps = zip(pairwise(starts), measured.parts, measured.records, strict=True)
        return all(record and np.array_equal(scored[slice(*ends)], part.tokens) for ends, part, record in steps)

    def observations(self, slots: Sequence[GuardSlot], asked: Sequence[Observation]) -> list[Observation] | str:
        """Observations of each guard on the baseline's pass, or the reason that it has to be run after all.

        :param asked: the taps that each guard wants.
        """
        observed = []
        for slot, asking in zip(slots, asked, strict=True):
            kept = self._taps_of(slot)
            if not asking.wanted or taps_optional(slot):
                kept = {}
            elif kept is None or kept.keys() != asking.wanted.keys():
                return f"guard {slot.name}: what it observes of the baseline is not in the reference"
            observed.append(Observation(kept=kept, message=asking.message, trace=asking.trace))
        return observed

    def _taps_of(self, slot: GuardSlot) -> Mapping[str, Any] | None:
        found = (guard["taps"] for guard in self.guards if guard.get("guard") == _described(slot))
        return next(found, None)


def _of_weights(fisher: Fisher, model: nn.Module) -> bool:
    """True if each curvature has the shape of a weight of the model."""
    shapes = {target.parameter_name: target.matrix_shape for target in find_weights(model)} if fisher else {}
    return all(name in shapes and each.shape == shapes[name] for name, each in fisher.items())


def kept_observations(
    slots: Sequence[GuardSlot], observed: Sequence[Observation]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Observations of guards as a reference holds them, and a reason for each guard whose cannot be held."""
    kept, refused = [], []
    for slot, observation in zip(slots, observed, strict=True):
        if not observation.wanted or taps_optional(slot):
            continue
        results = observation.results()
        try:
            if observation.message or all(result is None for result in results.values()):
                raise UnstorableError(observation.message or "its taps have no results")
            tensor_tree.storable(results)
            kept.append({"guard": _described(slot), "taps": results})
        except UnstorableError as error:
            refused.append(f"guard {slot.name}: {error}")
    return kept, refused


def taps_optional(slot: GuardSlot) -> bool:
    """True where a guard's ``prepare`` does without its taps on the baseline."""
    return inspect.getattr_static(slot.instance, "taps_optional", False) is True


def _described(slot: GuardSlot) -> dict[str, Any]:
    """A guard as far as its observations depend on it: its name, its code and its options."""
    plugin = slot.plugin
    code = digest_of(Path(plugin.file)) if plugin.origin is not Origin.BUILTIN and plugin.file else None
    return {"name": slot.name, "version": plugin.version, "code": code, "policy": dict(slot.policy)}


def _differing(held: Facts, here: Facts) -> Iterator[str]:
    """A phrase for each fact that differs."""
    for name in dict.fromkeys((*held, *here)):
        before, now = held.get(name), here.get(name)
        # A tokenizer that is not loaded has no part in the windows.
        if before != now and not (name == "tokenizer" and now is None):
            is_digest = any(isinstance(value, str) and len(value) >= DIGITS for value in (before, now))
            yield name if is_digest else f"{name} ({before} there, {now} here)"
