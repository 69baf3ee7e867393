"""Plans that a search has judged, kept in its output folder, so that the same command goes on after an interruption."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.output_folder import SEARCH, unwritable_said, write_text
from invarlock.core.errors import UsageError
from invarlock.core.plain import OWN, plain
from invarlock.core.results import Action, Verdict
from invarlock.evaluation.results import MetricResult, Number


@dataclass(frozen=True)
class Judged:
    """The judgement of one plan, as it is kept."""

    places: list[int]
    """Of the choice of each decision among its choices."""
    ratio: Number | None
    ci: list[Number] | None
    action: Action

    @classmethod
    def of(cls, places: list[int], metric: MetricResult | None, verdict: Verdict) -> Judged:
        ci = list(metric.ci) if metric and metric.ci else None
        return cls(places, metric.ratio if metric else None, ci, verdict.action)


@dataclass
class SearchState:
    """The plans that were judged.

    :param folder: of the output; None keeps nothing.
    :param of: what the judgements hold for: configuration, weights and candidates.
    """

    folder: Path | None
    of: str
    judged: list[Judged] = field(default_factory=list)

    @classmethod
    def opened(cls, folder: Path | None, of: str) -> SearchState:
        """The state that an earlier process left, or an empty one.

        :raises UsageError: it is of another configuration or model, or cannot be read.
        """
        file = folder / SEARCH if folder else None
        if file is None or not file.is_file():
            return cls(folder, of)
        try:
            values: Any = json.loads(file.read_text(encoding="utf-8"))
            judged = [Judged(**{**each, "action": Action(each["action"])}) for each in values["judged"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"output.dir: {file} is not the state of a search; remove it") from error
        if values.get("of") != of:
            problem = "is of a search with another configuration, or of other weights"
            raise UsageError(f"output.dir: {file} {problem}; choose another folder, or remove it")
        return cls(folder, of, judged)

    def add(self, judged: Judged) -> None:
        """Keep one more judgement, of a plan that was judged before in place of the earlier one.

        The file is written to the side and renamed.

        :raises UsageError: it cannot be written.
        """
        self.judged = [*(each for each in self.judged if each.places != judged.places), judged]
        if self.folder is not None:
            values = {"of": self.of, "judged": [plain(asdict(each), OWN) for each in self.judged]}
            with unwritable_said(self.folder):
                write_text(self.folder / SEARCH, json.dumps(values) + "\n")

    def remove(self) -> None:
        """Remove the file, once the report holds what was found."""
        if self.folder is not None:
            (self.folder / SEARCH).unlink(missing_ok=True)
