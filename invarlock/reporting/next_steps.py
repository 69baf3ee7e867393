"""Up to three steps to take next after a rejection or a warning, found in the report, ready to paste."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from invarlock.core.results import Action
from invarlock.reporting.describing import deciding, shown
from invarlock.reporting.plain_data import Node
from invarlock.reporting.report import NextStep, Report

MOST = 3
"""Steps of a report: more would be a list to choose from, not advice."""
MOST_EXCLUDED = 3
"""Modules that one step leaves out; beyond, the edit as a whole is the cause."""
WIDEST = 8
"""Bits of the widest plan."""
COARSEST, FINEST = 64, 32
"""Sizes of groups that help: larger ones differ little from whole channels, and smaller ones cost half a bit each."""
MOST_TIMES = 16
"""Times the windows that were measured: a ratio that needs more to be told from its limit is at the limit."""
OF_FILES = re.compile("stop tokens|generation|tokenizer|template|_token: ")
"""Words of the findings that other files beside the weights put right; not so the configuration's and the weights'."""
CHANGED_ON_PURPOSE = "if it is meant to change predictions, as a fine-tune is, only the perplexity rejects"


def next_steps(report: Report) -> list[NextStep]:
    """The steps, the most promising first; none where nothing objected."""
    if report.verdict.action in (None, Action.CONTINUE):
        return []
    found = {step.option: step for rule in RULES for step in rule(report)}
    return list(islice(found.values(), MOST)) or [*_looked_into(report)]


# -- rules: each yields steps where it applies -------------------------------------------------------------------------


def _uncovered(report: Report) -> Iterator[NextStep]:
    """The window, the option or the evaluation that closes a gap that the edit touches."""
    for gap in report.coverage.gaps:
        if gap.action is Action.WARN:
            option = re.search(r"--set \S+", gap.remedy)
            yield NextStep(option[0], f"measure the {gap.part}") if option else NextStep("", gap.remedy)


def _undecided(report: Report) -> Iterator[NextStep]:
    """More windows, where nothing but an interval that holds its limit objects."""
    if report.verdict.ending != "inconclusive":
        return
    metric, undecided = report.metrics.primary, report.metrics.undecided
    if not (metric and undecided and undecided.windows and undecided.windows <= metric.windows * MOST_TIMES):
        return
    figure = shown(metric.figure) if metric.undecided else "the predictions"
    reason = f"about {undecided.windows:,} windows tell {figure} from the limit"
    if undecided.option == "text":
        yield NextStep("", f"{reason}: give more text (dataset.path)")
    else:
        # Reports of earlier builds name none.
        key = undecided.option if undecided.option == "dataset.max_n" else "dataset.final_n"
        yield _set(key, undecided.windows, reason)


def _one_tokenizer(report: Report) -> Iterator[NextStep]:
    if report.edit.is_comparison and any(each.source == "tokenizer" for each in report.verdict.findings):
        yield NextStep("--tokenizer baseline", "if the subject is served with the baseline's tokenizer, measure it so")


def _served(report: Report) -> Iterator[NextStep]:
    """The files that a server reads, taken from the baseline."""
    found = next((guard for guard in report.guards if guard.name == "serving" and guard.action is not None), None)
    if not report.edit.is_comparison or found is None or found.action is Action.CONTINUE:
        return
    if not OF_FILES.search(found.message):
        return
    baseline, subject = (shlex.quote(path) for path in (report.model.id, _subject(report)))
    names = ["generation_config.json", "*token*", *(["*template*"] if "template" in found.message else [])]
    files = " ".join(f"{baseline}/{name}" for name in names)
    yield NextStep(f"cp {files} {subject}/", "unless that is meant, give the subject the baseline's files")


def _wider(report: Report) -> Iterator[NextStep]:
    bits = Node(report.edit.plan)["bitwidth"].whole()
    if _may_round_otherwise(report) and bits and bits < WIDEST:
        yield _set("edit.plan.bitwidth", bits + 1, "one more bit halves the rounding error")


def _blamed(report: Report) -> Iterator[NextStep]:
    """The modules that are blamed, left as they are."""
    names = _culprits(report)
    if not names:
        return
    if report.edit.is_comparison:
        reason = "take these from the baseline, or leave them out of the edit (`ignore`, `modules_to_not_convert`)"
        yield NextStep(json.dumps(names, ensure_ascii=False), reason)
    elif Node(report.edit.plan)["rules"] and not report.search:
        rule = json.dumps({"match": names, "keep": True}, ensure_ascii=False)
        yield NextStep(rule, "put this rule first in edit.plan: it leaves the blamed modules as they are")
    elif len(names) < len(report.edit.modules):
        plan = Node(report.config)["edit"]["plan"] if report.search else Node(report.edit.plan)
        kept = [entry.text() for entry in plan["exclude"].entries()]
        value = json.dumps([*kept, *names], ensure_ascii=False)
        yield _set("edit.plan.exclude", value, "leave the blamed modules as they are")


def _finer(report: Report) -> Iterator[NextStep]:
    size = Node(report.edit.plan)["group_size"].whole()
    finer = COARSEST if size is None else size // 2
    if _may_round_otherwise(report) and Node(report.edit.plan)["per_channel"].flag() and finer >= FINEST:
        yield _set("edit.plan.group_size", finer, "smaller groups keep outliers from the scale of the others")


def _meant(report: Report) -> Iterator[NextStep]:
    """The intent of a fine-tune, where the predictions alone were rejected."""
    if report.edit.is_comparison and report.verdict.decided_by == "predictions" and not report.verdict.accepted:
        yield _set("eval.intent", "improve", CHANGED_ON_PURPOSE)


def _unmeasured(report: Report) -> Iterator[NextStep]:
    if report.metrics.primary is None and report.edit.is_comparison and not _failed(report):
        yield NextStep("--generated", "in place of --weights-only: outputs tell whether the change harms")


def _without_failed(report: Report) -> Iterator[NextStep]:
    """The other guards alone, where one itself failed."""
    if failed := _failed(report):
        left = [guard.name for guard in report.guards if guard.name not in failed]
        yield _set("guards.order", f"[{', '.join(left)}]", f"until {', '.join(failed)} is repaired, ask the others")


def _confirmed(report: Report) -> Iterator[NextStep]:
    """Twice the windows, where outputs are within their limits and something else objects."""
    metric = report.metrics.primary
    if report.verdict.accepted and metric and metric.windows and metric.action is Action.CONTINUE:
        windows = 2 * metric.windows
        yield _set("dataset.final_n", windows, f"{windows:,} windows show harm to the outputs that is smaller")


RULES: Sequence[Callable[[Report], Iterator[NextStep]]] = (
    _without_failed, _uncovered, _undecided, _one_tokenizer, _served, _wider, _blamed, _finer, _meant, _unmeasured,
    _confirmed,
)  # fmt: skip
"""In the order of their promise: steps that close a question, that change the edit, that only look closer."""


def _looked_into(report: Report) -> Iterator[NextStep]:
    """The last resort: where no rule has a step."""
    found = deciding(report.verdict)
    yield NextStep("--verbose", f"look for what {found.source if found else 'objected'} means in each changed weight")


# -- facts that rules ask for ------------------------------------------------------------------------------------------


def _set(key: str, value: object, reason: str) -> NextStep:
    return NextStep(f"--set {shlex.quote(f'{key}={value}')}", reason)


def _subject(report: Report) -> str:
    return Node(report.edit.plan)["subject"].text("SUBJECT")


def _failed(report: Report) -> list[str]:
    return [guard.name for guard in report.guards if guard.error]


def _may_round_otherwise(report: Report) -> bool:
    """True of a rejected edit of ours that its format holds with other bits and groups, too."""
    output = Node(report.config)["output"]
    fixed = bool(output["save_model"]) and output["format"].text() == "gguf"
    # Floating-point numbers have the bits and blocks of their format.
    fixed |= Node(report.edit.plan)["format"].text("int") != "int"
    return not (report.verdict.accepted or report.edit.is_comparison or _failed(report) or fixed)


def _culprits(report: Report) -> list[str]:
    """Changed weights that the deciding finding names, or else those that are suspected, or that guards suspect."""
    changed = [weight.name for weight in report.edit.modules if weight.is_changed]
    found = deciding(report.verdict)
    message = found.message if found else ""
    named = [name for name in changed if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]|\.\w)", message)]
    suspects = named or [suspect.module for suspect in report.verdict.suspects] or [*_suspected_by_guards(report)]
    within = chain.from_iterable(
        (name for name in changed if name == suspect or name.startswith(f"{suspect}.")) for suspect in suspects
    )
    return list(islice(dict.fromkeys(within), MOST_EXCLUDED))


def _suspected_by_guards(report: Report) -> Iterator[str]:
    for guard in report.guards:
        if guard.action is not Action.CONTINUE:
            for suspect in Node(guard.metrics)["suspects"].entries():
                yield suspect["module"].text()
