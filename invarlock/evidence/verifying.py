"""A run's folder, held against itself, against a signature, and against the checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from invarlock.checkpoints.output_folder import SIGNATURE
from invarlock.config.loading import validate
from invarlock.config.reading import Source
from invarlock.config.schema import RunConfig
from invarlock.evidence import outputs, recomputing
from invarlock.evidence.disagreements import Disagreement, printable
from invarlock.evidence.folder import REPORT, artifacts, read_report
from invarlock.evidence.signing import signature
from invarlock.reporting.report import Report

RECOMPUTED: dict[str, Callable[[Report, RunConfig], Iterator[Disagreement]]] = {
    "configuration, its digest, plan and guards": recomputing.configuration,
    "perplexities, ratio and interval, from the windows": outputs.metric,
    "rises of the windows, limits and action of the predictions": outputs.predictions,
    "guards: whether they passed, against their actions": recomputing.guards,
    "weights: bits and errors of each, against the plan": recomputing.weights,
    "findings, against coverage, guards, metric and predictions": recomputing.findings,
    "verdict, reasons, suspects and exit code": recomputing.verdict,
    "attempts": recomputing.attempts,
    "fingerprints, against the verdict": recomputing.model,
}


@dataclass
class Verification:
    """Checks that were made, those that were not and why, and disagreements."""

    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)

    def check(self, what: str, found: Iterable[Disagreement]) -> None:
        self.checked.append(what)
        self.disagreements += found


@dataclass(frozen=True)
class Run:
    """A run's folder, its report, and the configuration in it."""

    folder: Path
    report: Report
    config: RunConfig

    @classmethod
    def read(cls, folder: Path) -> Run:
        """:raises UsageError: there is no report, or it is broken."""
        report = read_report(folder)
        return cls(folder, report, validate(Source(f"{folder / REPORT}: config", report.config)))


def verify(run: Run, public_key: str | None = None) -> Verification:
    """Compute again what follows from the report, and check the files and the signature.

    Nothing that the report names is imported, fetched or opened, but files of its own folder.

    :param public_key: a PEM file; without it no signature is checked.
    :raises UsageError: the windows or the key are broken.
    """
    verification = Verification()
    # A stranger's numbers can be any.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what, recompute in RECOMPUTED.items():
            verification.check(what, recompute(run.report, run.config))
    verification.check("files of the model, by their SHA-256", artifacts(run.folder, run.report, run.config))
    verification.not_checked.append("what guards measured: the report holds what they said, not what they saw")
    if run.report.reference is not None:
        verification.not_checked.append("the baseline's losses: they are of a reference, which is not in the folder")
    if public_key is not None:
        verification.check("signature of every file in the folder", signature(run.folder, public_key))
    elif (run.folder / SIGNATURE).is_file():
        verification.not_checked.append("signature: give --public-key")
    else:
        verification.not_checked.append("signature: there is none")
    if public_key is None:
        verification.not_checked += [f"{printable(name)}: no digest vouches for it" for name in _beside(run.folder)]
    return verification


def _beside(folder: Path) -> list[str]:
    """Files in a run's folder that stand in no report."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (REPORT, "model", SIGNATURE))
