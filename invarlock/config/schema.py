"""Every key of the configuration: its type, its default, and a sentence.

The one source for validation, the JSON Schema, ``invarlock run --help``, the man page and ``docs/configuration.md``.
It imports nothing heavy, for ``--help`` needs it: plain data classes, constraints by ``annotated_types``.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, IsFinite, Le, Lt, MinLen

from invarlock.quantization.rules import AnyPlan, Rule, Rules
from invarlock.quantization.scheme import Plan, Scheme

if not TYPE_CHECKING:
    # A list of rules is read by ``config.rules``: pydantic could not tell which of two forms a mistake is in.
    AnyPlan = Plan

PLAN = "edit.plan"
GENERATED = "generated"
"""The one provider that is no plugin: the baseline writes its own windows."""
PATHS = ("model.id", "dataset.path", "output.dir")
"""Keys whose values are paths, or ids on a hub: ``invarlock.core.paths`` has the rule."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Section:
    """Data class whose unknown keys pydantic refuses."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelConfig(_Section):
    id: Annotated[str, MinLen(1), "Folder or file of the checkpoint, or an id on a hub."]
    adapter: Annotated[str, "Adapter that loads it; auto asks every adapter, the generic one last."] = "auto"
    device: Annotated[
        str, "Where it runs: auto, cpu, cuda, cuda:1, mps; balanced: spread over all devices of the machine."
    ] = "auto"
    dtype: Annotated[Dtype, "Data type of the weights; auto keeps the checkpoint's."] = "auto"
    parallel: Annotated[
        Literal["auto", "windows", "tensor", "fully_sharded"],
        "How several processes share a model in memory: each has all of it and takes some windows; or each has a "
        "part of every layer (tensor parallelism); or of every weight (FSDP2). auto takes the first one if a device "
        "holds the model, else the second if its heads can be divided, else the third.",
    ] = "auto"
    trust_remote_code: Annotated[bool, "Whether code that lies beside the weights may run."] = False
    revision: Annotated[str | None, "Branch, tag or commit on a hub."] = None


@dataclass(frozen=True)
class DatasetConfig(_Section):
    provider: Annotated[
        str,
        "Where samples come from: local_jsonl, local_text, demo, hf (text); local_images, local_audio, pairs (of "
        "texts, or of a text and an image or a sound); or a provider of a plugin; generated: the baseline writes its "
        "own windows.",
    ] = GENERATED
    path: Annotated[str | None, "File or folder of a local provider, or name of a dataset on a hub."] = None
    name: Annotated[str | None, "Configuration of a dataset on a hub."] = None
    text_field: Annotated[str, "Field that holds the text."] = "text"
    split: Annotated[str, "Split of a dataset on a hub."] = "validation"
    seq_len: Annotated[int, Ge(8), "Tokens a window, special tokens included."] = 256
    stride: Annotated[
        int | None, "Tokens from the start of a window to the next, at least seq_len; null means seq_len."
    ] = None
    preview_n: Annotated[int, Ge(1), "Windows that the guards calibrate on."] = 8
    final_n: Annotated[
        Literal["auto"] | Annotated[int, Ge(2)],
        "Windows that decide, disjoint from the preview. auto measures them in growing steps, and ends as soon as the "
        "limits are certain to be kept or broken; a number measures so many, whatever they show.",
    ] = "auto"
    max_n: Annotated[int, Ge(4), "Most windows that auto measures, as far as there is text."] = 256
    seed: Annotated[int, Ge(0), "Seed of the choice of windows, of masks and of generation."] = 42
    chat: Annotated[
        Literal["auto", "never"],
        "Conversations: with auto, where text is read and the baseline's tokenizer has a chat template, one window in "
        "four is a conversation that it renders of the same text, so that chat tokens are measured; with never, none.",
    ] = "auto"

    @property
    def is_stepped(self) -> bool:
        """True if windows are measured only until the limits are certain."""
        return self.final_n == "auto"

    def counted(self, windows: int) -> CountedDataset:
        """The dataset with so many windows that decide."""
        return CountedDataset(**{**vars(self), "final_n": windows})

    @property
    def has_conversations(self) -> bool:
        """True if a chat template, where there is one, renders some windows."""
        return self.chat == "auto" and not self.is_generated

    @property
    def is_generated(self) -> bool:
        """True if the baseline writes its own text."""
        return self.provider == GENERATED


@dataclass(frozen=True)
class CountedDataset(DatasetConfig):
    """A dataset of a number of windows, as those that make them are given it."""

    final_n: int = 2


@dataclass(frozen=True)
class RetryConfig(_Section):
    max_attempts: Annotated[
        int, Ge(1), Le(7), "Attempts in all: after a rollback there is a next one, with more bits; see strategy."
    ] = 1
    strategy: Annotated[
        Literal["uniform", "suspects"],
        "Weights that get more bits: with uniform all, one more each, up to 8; with suspects the modules that the "
        "verdict blames, and those that contribute most to the rise of the loss, until the limit is predicted to hold. "
        "Modules that engines fuse (q/k/v, gate/up, experts) get the same; what has 8 bits is left alone.",
    ] = "uniform"


@dataclass(frozen=True)
class TargetConfig(_Section):
    max_pm_ratio: Annotated[
        float | None, Ge(1.0), IsFinite, "Search the fewest bits that pass with this limit, in place of that in eval."
    ] = None
    bits_per_weight: Annotated[
        float | None, Gt(2.0), Le(9.0), "Search the best plan with at most so many bits a weight, scales included."
    ] = None

    @property
    def is_set(self) -> bool:
        return self.max_pm_ratio is not None or self.bits_per_weight is not None


@dataclass(frozen=True)
class SearchConfig(_Section):
    max_attempts: Annotated[int, Ge(1), Le(50), "Plans of a search that are applied and judged, at most."] = 6
    max_minutes: Annotated[
        float | None, Gt(0.0), IsFinite, "Minutes after which a search begins no further attempt; null sets no limit."
    ] = None
    fuse: Annotated[
        bool, "Whether modules that engines fuse (q/k/v, gate/up, the experts of a layer) share a scheme."
    ] = True


@dataclass(frozen=True)
class EditConfig(_Section):
    name: Annotated[Literal["quant_rtn"], "Round-to-nearest is the only edit."] = "quant_rtn"
    plan: AnyPlan = field(default_factory=Plan)
    retry: RetryConfig = field(default_factory=RetryConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    @property
    def is_searched(self) -> bool:
        """True where the bits are left to a search."""
        return isinstance(self.plan, Plan) and self.plan.is_searched


@dataclass(frozen=True)
class GuardsConfig(_Section):
    order: Annotated[tuple[str, ...], "Guards to run, in this order; a name listed twice runs twice."] = (
        "invariants",
        "serving",
        "reconstruction",
        "spectral",
        "variance",
    )
    fail_fast: Annotated[bool, "Stop at the first guard that calls for rollback or abort."] = False
    options: Annotated[
        dict[str, dict[str, Any]], "Written as guards.NAME.OPTION: the options of guard NAME, given to its constructor."
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricConfig(_Section):
    kind: Annotated[
        Literal[
            "auto", "perplexity", "masked_perplexity", "target_perplexity", "cosine_distance", "label_disagreement"
        ],
        "Primary metric; auto takes the one that the model's task calls for.",
    ] = "auto"
    limit: Annotated[
        float | None,
        Gt(0.0),
        IsFinite,
        "Largest value of a primary metric other than a ratio of perplexities, as a cosine distance; null leaves it to "
        "the task. The interval's upper end is held against it.",
    ] = None
    reps: Annotated[int, Ge(100), Le(1_000_000), "Bootstrap resamples."] = 2000
    ci_level: Annotated[float, Gt(0.5), Lt(1.0), "Confidence level of the interval."] = 0.95


@dataclass(frozen=True)
class EvalConfig(_Section):
    metric: MetricConfig = field(default_factory=MetricConfig)
    intent: Annotated[
        Literal["preserve", "improve"],
        "Purpose of the edit: preserve what the baseline predicts, as quantization does, or improve on it, as a "
        "fine-tune does. With improve, predictions that differ from the baseline's (KL divergence, top-1 disagreement) "
        "warn and do not reject; a perplexity above max_pm_ratio still does.",
    ] = "preserve"
    attribute: Annotated[
        int,
        Ge(0),
        "Weights to put back one at a time, those first that contribute most to the predicted rise of the loss, to "
        "measure the part of it that each is responsible for; each takes two more passes over the final windows, of "
        "what follows its block where blocks are a plain sequence. The prediction is then by gradients on all preview "
        "windows, which takes about as long as three passes over them.",
    ] = 0
    max_pm_ratio: Annotated[
        float, Ge(1.0), IsFinite, "Limit of the ratio edited / baseline; the interval's upper end is held against it."
    ] = 1.10

    @property
    def improving(self) -> bool:
        """True for an edit that is meant to change what the baseline predicts."""
        return self.intent == "improve"


@dataclass(frozen=True)
class OutputConfig(_Section):
    dir: Annotated[str | None, "Folder of the report; by default runs/NAME-TIME, new for each run."] = None
    save_model: Annotated[bool, "Whether an accepted model is saved, to DIR/model."] = False
    format: Annotated[
        str,
        "Format of the saved model: compressed-tensors, packed codes for vLLM and transformers; dequantized, its own "
        "layout and data type; gguf, blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 for llama.cpp (bitwidth 4, 5 or 8, "
        "group_size 32); or a plugin's.",
    ] = "compressed-tensors"


@dataclass(frozen=True)
class RunConfig(_Section):
    """One run. Every section but ``model`` has defaults."""

    model: ModelConfig
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    plugins: Annotated[tuple[str, ...], "Modules or plugin names to load, as with -p."] = ()

    def as_dict(self) -> dict[str, Any]:
        """The configuration as it would stand in a file, every key with its value."""
        values = dataclasses.asdict(self)
        values["guards"] |= values["guards"].pop("options")
        if isinstance(self.edit.plan, Rules):
            values["edit"]["plan"] = values["edit"]["plan"]["rules"]
        return values


@dataclass(frozen=True)
class Key:
    """One key as a reader sees it."""

    path: str
    type: str
    default: str
    sentence: str


def keys(section: Any = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, depth first, in the order of the file."""
    hints = get_type_hints(section, include_extras=True)
    for entry in dataclasses.fields(section):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{entry.name}.")
            if hint is Plan:
                yield from _rule_keys()
        elif entry.name == "options":
            yield Key(f"{prefix}NAME.OPTION", "any", "the guard's own", sentence_of(hint))
        else:
            yield Key(prefix + entry.name, _type_text(hint), _default_text(entry), sentence_of(hint))


def _rule_keys() -> Iterator[Key]:
    """Keys of a rule, where the plan is a list of them, besides those of a scheme, which a plan has too."""
    hints = get_type_hints(Rule, include_extras=True)
    yield Key(f"{PLAN}[N].match", "string or list of strings", "required", sentence_of(hints["match"]))
    yield Key(f"{PLAN}[N].keep", _type_text(hints["keep"]), "false", sentence_of(hints["keep"]))
    schemes = ", ".join(entry.name for entry in dataclasses.fields(Scheme))
    yield Key(f"{PLAN}[N].SCHEME", "any", "as of the plan", f"A key of the scheme, as in a plan: {schemes}.")


def sentence_of(hint: Any) -> str:
    """The sentence in an ``Annotated`` type."""
    return next(extra for extra in get_args(hint)[1:] if isinstance(extra, str))


def _default_text(entry: dataclasses.Field[Any]) -> str:
    if entry.default is dataclasses.MISSING:
        return "required"
    if isinstance(entry.default, tuple):
        return "[" + ", ".join(entry.default) + "]"
    if entry.default is None:
        return "null"
    return str(entry.default).lower() if isinstance(entry.default, bool) else str(entry.default)


def _type_text(hint: Any) -> str:
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is Union:
        return " | ".join(map(_type_text, get_args(kind)))
    if get_origin(kind) is tuple:
        return "list of strings"
    if isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    name = {str: "string", int: "integer", float: "number", bool: "true | false"}[kind]
    return f"{name} {_bounds(extras)}".rstrip()


def _bounds(extras: list[Any]) -> str:
    """The range of a number, in signs; empty where any will do."""
    inclusive = [str(extra.ge if isinstance(extra, Ge) else extra.le) for extra in extras if isinstance(extra, Ge | Le)]
    if len(inclusive) == 2:
        return "..".join(inclusive)
    return ", ".join(sign for extra in extras if (sign := _sign(extra)))


def _sign(extra: Any) -> str:
    match extra:
        case Ge(ge=low):
            return f">= {low}"
        case Gt(gt=low):
            return f"> {low}"
        case Le(le=high):
            return f"<= {high}"
        case Lt(lt=high):
            return f"< {high}"
    return ""


def as_keys(message: str, plan: str = PLAN) -> str:
    """A message about a plan, whose fields are in backquotes, with the keys of the configuration in their place.

    :param plan: the key that the fields are below; a message about a list names the rule as well: ```[1].match```.
    """
    fields = "|".join(entry.name for section in (Plan, Rule) for entry in dataclasses.fields(section))
    message = re.sub(rf"`(\[\d+\]\.(?:{fields}))`", rf"{plan}\1", message)
    return re.sub(f"`({fields})`", rf"{plan}.\1", message)
