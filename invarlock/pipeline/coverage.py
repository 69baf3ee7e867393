"""Coverage: parts of a model that the windows did not exercise, and what would exercise them.

A gap informs, and warns only where the edit touches it: what was not measured may then be what broke.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from invarlock.checkpoints.soundness import read_json
from invarlock.config.schema import CountedDataset, DatasetConfig
from invarlock.core.results import Action, EditedWeight
from invarlock.datasets.conversations import ChatTemplate
from invarlock.datasets.layout import Windows
from invarlock.datasets.windows import conversation_places
from invarlock.evaluation.task import Task
from invarlock.models.configuration import position_fields_of
from invarlock.models.facts import context_of, text_config_of
from invarlock.models.simulation import ACTIVATIONS, CACHE, Simulation
from invarlock.reporting.report import CoverageSection, Gap, TokensSeen

NEAR_CHANCE = "baseline near chance"
CHANCE = 0.5
"""Share of the vocabulary's size from which on a perplexity is near chance: the model then knows less than one bit of a
token more than uniform guessing, where counting how often words occur yields several."""
TOWERS = {"vision_config": "vision", "audio_config": "audio"}
UNSIMULATED = {
    "kv_cache_scheme": CACHE, "kv_cache_quant_algo": CACHE, "kv_cache_config": CACHE, "kv_cache_group": CACHE,
    "input_activations": ACTIVATIONS, "output_activations": ACTIVATIONS, "activation_scheme": ACTIVATIONS,
    "input_tensors": ACTIVATIONS, "output_tensors": ACTIVATIONS,
}  # fmt: skip
"""Keys by which quantizers declare what a server rounds as it runs: compressed-tensors, ModelOpt, FP8, Quark."""
LONGEST_VALUE = 40
MOST_NAMES = 4


@dataclass(frozen=True)
class Declared:
    """Abilities that a checkpoint declares in its configuration, and that a few windows of text need not exercise."""

    in_gguf: bool
    context: int | None
    positions: Mapping[str, Any]
    towers: tuple[str, ...]
    unsimulated: frozenset[str]
    simulated: Mapping[str, str]
    """Words for what passes simulate, by part."""

    @classmethod
    def of(cls, model: torch.nn.Module, model_id: str, simulation: Simulation) -> Declared:
        """:raises InputError: a JSON file of the checkpoint is broken."""
        config = getattr(model, "config", None)
        # The loaded configuration lacks the quantization, for weights are unpacked, and towers that were not loaded.
        stored = _stored(model_id, "config.json")
        quantization = [stored.get("quantization_config"), _stored(model_id, "hf_quant_config.json")]
        return cls(
            in_gguf=model_id.endswith(".gguf"),
            context=context_of(model),
            positions=position_fields_of(text_config_of(model)),
            towers=tuple(name for key, name in TOWERS.items() if stored.get(key) or getattr(config, key, None)),
            unsimulated=frozenset(_unsimulated(quantization)) - simulation.described.keys(),
            simulated=simulation.described,
        )


def coverage_of(
    declared: Declared,
    windows: Sequence[Windows],
    *,
    vocabulary: int,
    tokenizer: Any,
    template: ChatTemplate | None,
    dataset: CountedDataset,
    task: Task,
    perplexity: float,
    experts: Sequence[torch.Tensor | None] = (),
) -> CoverageSection:
    """The parts of the baseline that the windows exercised, and those that they did not.

    :param tokenizer: None where there is none; all tokens are then ordinary ones.
    :param template: the tokenizer's chat template, or None.
    :param perplexity: the baseline's, where its task is to predict tokens.
    :param experts: of each layer of experts, which of them received a token of the preview windows; None if not known.
    """
    seen = {token for part in windows for token in torch.cat([part.input_ids, part.labels], dim=1).flatten().tolist()}
    # A vocabulary is often padded beyond the tokens that there are.
    known = {*range(vocabulary if tokenizer is None else min(vocabulary, len(tokenizer)))}
    names = {token: name for token, name in _special_tokens(tokenizer).items() if token in known}
    ordinary, special = known - names.keys(), known & names.keys()
    tokens = [TokensSeen("ordinary", len(ordinary & seen), len(ordinary))]
    tokens.append(TokensSeen("special", len(special & seen), len(special)))
    gaps = [
        # What it writes itself is as likely to it as can be, and near chance where it is unsure.
        *(() if dataset.is_generated or task.metric.statistic != "ratio" else _near_chance(perplexity, vocabulary)),
        *_made_up(task.made_up if dataset.is_generated else task.made_up_media),
        *_context(declared, windows[-1].input_ids.shape[1]),
        *_special_gap([names[token] for token in sorted(special - seen)], len(special), template, dataset),
        *_unrendered(template, dataset),
        *_ordinary_gap(len(ordinary - seen), len(ordinary), dataset),
        *_unrouted([routed for routed in experts if routed is not None], dataset),
        *_not_run(declared, task.towers),
    ]
    rendering = template is not None and template.roles and dataset.has_conversations
    images = sum(int(part.illustrated.sum()) for part in windows if part.illustrated is not None)
    return CoverageSection(tokens, gaps, len(conversation_places(dataset)) if rendering else 0, images)


def touched(before: Declared, after: Declared, windows: Sequence[Windows] | None) -> list[Gap]:
    """Gaps that an edited checkpoint opens: it changes what the windows do not exercise."""
    length = windows[-1].input_ids.shape[1] if windows else 0
    opened = [replace(_unserved(part), action=Action.WARN) for part in sorted(after.unsimulated - before.unsimulated)]
    return [*_position_changes(before, after, length), *opened, *_simulated(after)]


def unreached(weights: Sequence[EditedWeight], never_ran: Collection[str]) -> list[Gap]:
    """The gap of edited weights that no window reaches.

    :param never_ran: names of modules.
    """
    edited = [weight.name for weight in weights if weight.is_changed]
    missed = [name for name in edited if name in never_ran or name.rpartition(".")[0] in never_ran]
    if not missed:
        return []
    message = f"not exercised: {len(missed)} of {len(edited)} edited weights, which no window reaches (as {missed[0]})"
    return [
        Gap(
            "weights that never ran",
            Action.WARN,
            message,
            "an evaluation with the inputs that they read exercises them",
        )
    ]


def of_edit(baseline: CoverageSection, opened: Sequence[Gap], *, equal: bool = True) -> CoverageSection:
    """The coverage of an edit: the baseline's, with the gaps that the edit opens in front.

    :param equal: whether all losses are as they were; a baseline near chance matters only where they differ.
    """
    parts = {gap.part for gap in opened}
    kept = [
        gap if equal or gap.part != NEAR_CHANCE else replace(gap, action=Action.WARN)
        for gap in baseline.gaps
        if gap.part not in parts
    ]
    return replace(baseline, gaps=[*opened, *kept])


# -- what a checkpoint declares ----------------------------------------------------------------------------------------


def _stored(model_id: str, name: str) -> dict[str, Any]:
    path = Path(model_id) / name
    return read_json(path) if path.is_file() else {}


def _unsimulated(value: Any) -> Iterator[str]:
    """Names of what is rounded as the model runs, wherever a quantization's configuration declares it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from (part for key, part in UNSIMULATED.items() if value.get(key))
            if "activation" in str(value.get("quant_type")).lower() or value.get("act_bits", 16) not in (None, 16, 32):
                # By torchao's class, as Int8DynamicActivationInt8WeightConfig, and by AutoRound's bits.
                yield ACTIVATIONS
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id, those that only a chat template uses among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = [token for token in getattr(tokenizer, "all_special_ids", ()) if token is not None]
    return {token: f"token {token}" for token in ids} | {
        token: str(entry.content) for token, entry in added.items() if entry.special or token in ids
    }


# -- gaps --------------------------------------------------------------------------------------------------------------


def _near_chance(perplexity: float, vocabulary: int) -> Iterator[Gap]:
    if perplexity > CHANCE * vocabulary:
        message = (
            f"nothing can be judged by this baseline: its perplexity, {perplexity:.4g}, is near chance, which is the "
            f"size of its vocabulary, {vocabulary:,}"
        )
        yield Gap(NEAR_CHANCE, Action.CONTINUE, message, "give a trained baseline, or text that it was trained for")


def _context(declared: Declared, length: int) -> Iterator[Gap]:
    if declared.context is None or length >= declared.context:
        return
    window = declared.positions.get("sliding_window")
    unmoved = f", nor its sliding window of {window:,} tokens" if isinstance(window, int) and window >= length else ""
    message = f"not exercised: context beyond {length:,} of {declared.context:,} tokens{unmoved}"
    yield Gap("context", Action.CONTINUE, message, f"--set dataset.seq_len={declared.context} exercises it")


def _special_gap(
    missed: Sequence[str], known: int, template: ChatTemplate | None, dataset: DatasetConfig
) -> Iterator[Gap]:
    if missed:
        names = ", ".join([*missed[:MOST_NAMES], *(["..."] if len(missed) > MOST_NAMES else [])])
        message = f"not exercised: {len(missed):,} of {known:,} special tokens ({names})"
        remedy = "text that contains them exercises them (dataset.path)"
        if rendered := sum(name in template.sample for name in missed) if template else 0:
            remedy = f"{_conversing(dataset)} exercises {rendered:,} of them"
        yield Gap("special tokens", Action.CONTINUE, message, remedy)


def _conversing(dataset: DatasetConfig) -> str:
    """The change that makes windows hold what a chat template renders."""
    if dataset.is_generated:
        return "text, of which the chat template renders a part (dataset.path),"
    return f"--set dataset.seq_len={2 * dataset.seq_len}" if dataset.has_conversations else "--set dataset.chat=auto"


def _unrendered(template: ChatTemplate | None, dataset: DatasetConfig) -> Iterator[Gap]:
    if template and not template.roles and dataset.has_conversations:
        message = f"not exercised: the chat template, which renders no conversation: {template.refusal}"
        yield Gap(
            "chat template", Action.CONTINUE, message, "text that holds conversations exercises it (dataset.path)"
        )


def _ordinary_gap(missed: int, known: int, dataset: DatasetConfig) -> Iterator[Gap]:
    if missed:
        message = f"not exercised: {missed:,} of {known:,} ordinary tokens"
        remedy = f"--set dataset.final_n={2 * dataset.final_n} exercises more"
        yield Gap("ordinary tokens", Action.CONTINUE, message, remedy)


def _unrouted(experts: Sequence[torch.Tensor], dataset: DatasetConfig) -> Iterator[Gap]:
    missed = sum(int((~routed).sum()) for routed in experts)
    if missed:
        message = (
            f"not exercised: {missed:,} of {sum(map(len, experts)):,} experts, which no token of the preview windows "
            "was routed to"
        )
        remedy = f"--set dataset.preview_n={2 * dataset.preview_n} exercises more"
        yield Gap("experts", Action.CONTINUE, message, remedy)


def _made_up(samples: str) -> Iterator[Gap]:
    if samples:
        message = f"not exercised: real inputs, for samples are {samples}"
        yield Gap(
            "real inputs", Action.CONTINUE, message, "an evaluation with data exercises them (dataset.path for text)"
        )


def _not_run(declared: Declared, given: Collection[str]) -> Iterator[Gap]:
    for tower in (tower for tower in declared.towers if tower not in given):
        message = f"not exercised: the {tower} tower, for windows hold text alone"
        yield Gap(f"{tower} tower", Action.CONTINUE, message, f"an evaluation with {tower} inputs exercises it")
    yield from map(_unserved, sorted(declared.unsimulated))
    yield from _simulated(declared)


def _unserved(part: str) -> Gap:
    message = f"the {part} was not judged: the checkpoint declares it, and passes run without it"
    return Gap(part, Action.CONTINUE, message, "an evaluation by the engine that serves the checkpoint exercises it")


def _simulated(declared: Declared) -> Iterator[Gap]:
    for part, words in sorted(declared.simulated.items()):
        message = f"the {part} was simulated ({words}), not done by the kernels of an engine"
        yield Gap(part, Action.CONTINUE, message, "an evaluation by the engine that serves the checkpoint runs these")


def _position_changes(before: Declared, after: Declared, length: int) -> Iterator[Gap]:
    if before.in_gguf != after.in_gguf:
        # GGUF leaves out what llama.cpp knows by the architecture, and scales rope by a tensor: defaults are no change.
        return
    reach = max(before.context or 0, after.context or 0)
    names = dict.fromkeys((*before.positions, *after.positions))
    old_new = {name: (before.positions.get(name), after.positions.get(name)) for name in names}
    changed = [f"{name} {_change(*values)}" for name, values in old_new.items() if values[0] != values[1]]
    if changed and length < reach:
        measured = f"{length:,} of {reach:,} tokens were measured" if length else "no outputs were measured"
        message = f"changes outputs beyond what was measured: {', '.join(changed)}; {measured}"
        yield Gap("context", Action.WARN, message, f"--set dataset.seq_len={reach} exercises it")


def _change(old: Any, new: Any) -> str:
    shown = ["none" if value is None else str(value) for value in (old, new)]
    return f"({' -> '.join(shown)})" if max(map(len, shown)) <= LONGEST_VALUE else "(differs)"
