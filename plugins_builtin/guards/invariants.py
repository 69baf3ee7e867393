"""Structure and sanity: invariants of any edit of weights, and NaN or Inf."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invarlock.api import Guard, each
from plugins_builtin.guards.figures import first_few

if TYPE_CHECKING:
    import torch

    from plugins_builtin.guards.tensor_facts import TensorFacts


@dataclass(frozen=True)
class _VocabularyRows:
    """Numbers of the embedding's rows; None where a model has no such embedding."""

    before: int | None
    after: int | None

    def axis(self, old: Sequence[int], new: Sequence[int]) -> int | None:
        """The one axis along which two shapes differ, if they differ just as the vocabularies do."""
        differing = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if sizes[0] != sizes[1]]
        if len(old) != len(new) or len(differing) != 1:
            return None
        return differing[0] if (old[differing[0]], new[differing[0]]) == (self.before, self.after) else None

    def shared(self, old: Sequence[int], new: Sequence[int]) -> tuple[int, int] | None:
        """The axis of a tensor that has grown with the vocabulary, and how many entries along it there were."""
        axis = self.axis(old, new)
        return None if axis is None or old[axis] > new[axis] else (axis, old[axis])

    @property
    def difference(self) -> str:
        """``64 embedding rows more than the baseline's 1024``; empty where there is none."""
        if self.before is None or self.after is None or self.before == self.after:
            return ""
        word = "more" if self.after > self.before else "fewer"
        return f"{abs(self.after - self.before)} embedding rows {word} than the baseline's {self.before}"


@dataclass(frozen=True)
class _State:
    parameters: dict[str, TensorFacts]
    buffers: dict[str, TensorFacts]
    ties: frozenset[frozenset[str]]
    norms: frozenset[str]
    embedding_rows: int | None
    flagged_tied: bool
    """True if the configuration says that the head is the embedding."""

    @property
    def tensors(self) -> dict[str, TensorFacts]:
        return self.parameters | self.buffers

    @classmethod
    def of(cls, model: torch.nn.Module, before: _State | None = None) -> _State:
        """
        :param before: of the baseline; of what has grown with the vocabulary only the baseline's part is looked at.
        """
        from invarlock.api import is_norm
        from plugins_builtin.guards.tensor_facts import batches, facts_of

        old = before.tensors if before else {}
        vocabulary = _VocabularyRows(before.embedding_rows if before else None, _embedding_rows(model))
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        shared = {id(each): vocabulary.shared(old[name].shape, each.shape) for name, each in named if name in old}

        parameters = dict(model.named_parameters(remove_duplicate=False))
        by_identity: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            by_identity[id(parameter)].append(name)
        of_parameters = batches(parameters[names[0]] for names in by_identity.values())
        looked_at = each(lambda batch: facts_of(batch.tensors, shared), of_parameters)
        found = dict(zip(by_identity, itertools.chain(*looked_at), strict=True))
        buffers = dict(model.named_buffers())
        return cls(
            parameters={name: found[id(parameter)] for name, parameter in parameters.items()},
            buffers=dict(zip(buffers, facts_of(buffers.values(), shared), strict=True)),
            ties=frozenset(frozenset(names) for names in by_identity.values() if len(names) > 1),
            norms=frozenset(name for name, module in model.named_modules() if is_norm(module)),
            embedding_rows=vocabulary.after,
            flagged_tied=bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False)),
        )


class InvariantsGuard(Guard):
    """Compares the model with its own baseline.

    - Abort: names, shapes or norm layers that are missing, new or different; NaN or Inf that the baseline has not;
      fewer embedding rows than the vocabulary has entries.
    - Rollback: a norm's weight that has become all zero; untied weights that are now tied; tied ones that now differ,
      unless outputs were measured and the configuration says that the head is one of its own.
    - Warn: another tensor that has become all zero; rows or columns that have become constant or all zero. Each may be
      harmless, and the outputs tell. So are lost embedding rows, where no tokenizer says which of them are needed. Rows
      that were added only have to be finite.
    """

    name = "invariants"
    shares_work = True

    def __init__(self) -> None:
        self._baseline: _State | None = None

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        self._baseline = _State.of(model)
        broken = [name for name, tensor in self._baseline.parameters.items() if not tensor.finite]
        return {
            "ready": True,
            "parameters": len(self._baseline.parameters),
            "buffers": len(self._baseline.buffers),
            "norms": len(self._baseline.norms),
            "tied_groups": len(self._baseline.ties),
            "non_finite_in_baseline": broken[:5],
        }

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        if self._baseline is None:
            return {"passed": False, "action": "abort", "message": "not measured: prepare was not called"}
        before, after = self._baseline, _State.of(model, self._baseline)
        vocabulary = _VocabularyRows(before.embedding_rows, after.embedding_rows)
        fatal = [
            *_named("missing", before.parameters.keys() - after.parameters.keys()),
            *_named("new", after.parameters.keys() - before.parameters.keys()),
            *_named("missing buffer", before.buffers.keys() - after.buffers.keys()),
            *_named("missing norm layer", before.norms - after.norms),
            *_new_shapes(before, after, vocabulary),
            *_named("NaN or Inf in", _newly(before, after, lambda old, new: old.finite and not new.finite)),
            *_too_few_embeddings(before, after, context.get("vocabulary")),
        ]
        zeroed = {*_newly(before, after, lambda old, new: new.zero > old.zero)}
        torn = _torn_ties(model, before.ties, after.ties)
        # Of an edited head that says so, outputs tell what it did, as of any other weight.
        honest = not after.flagged_tied and context.get("edited") is not None
        grave = [
            *_named("norm weight zeroed", zeroed & {f"{norm}.weight" for norm in before.norms}),
            *_named("no longer tied, and different:", [] if honest else torn),
            *_named("now tied:", _new_ties(before.ties, after.ties)),
        ]
        doubtful = [
            *_named("all zero:", zeroed - {f"{norm}.weight" for norm in before.norms}),
            *_named("constant rows in", _newly(before, after, lambda old, new: new.constant_rows > old.constant_rows)),
            *_named(
                "constant columns in",
                _newly(before, after, lambda old, new: new.constant_columns > old.constant_columns),
            ),
            *_lost_rows(vocabulary, context.get("vocabulary")),
            *_new_types(before, after),
        ]
        findings = [*fatal, *grave, *doubtful]
        action = "abort" if fatal else "rollback" if grave else "warn" if doubtful else "continue"
        return {
            "passed": not (fatal or grave),
            "action": action,
            "message": first_few(findings) or "; ".join(filter(None, (_sound(after), vocabulary.difference))),
            "warnings": doubtful,
            "metrics": {
                "parameters": len(after.parameters),
                "suspects": _suspects(findings, after),
                "abort": fatal,
                "rollback": grave,
                "warn": doubtful,
            },
        }


def _suspects(findings: Sequence[str], after: _State) -> list[dict[str, Any]]:
    """The modules that findings name, in their order, those of one finding in the order of the model."""
    places = {name: place for place, name in enumerate(after.parameters)}
    found: dict[str, str] = {}
    for finding in findings:
        words = {word.rstrip(":") for word in finding.split()}
        for name in sorted(filter(places.__contains__, words), key=places.__getitem__):
            found.setdefault(name.removesuffix(".weight").removesuffix(".bias"), finding)
    return [{"module": module, "evidence": finding} for module, finding in found.items()]


def _named(what: str, names: Iterable[str]) -> list[str]:
    return [f"{what} {name}" for name in sorted(names)]


def _newly(before: _State, after: _State, worse: Any) -> list[str]:
    """Names of tensors on both sides for which a comparison of old and new holds; tied ones by their first name."""
    found: dict[int, str] = {}
    old = before.tensors
    for name, tensor in after.tensors.items():
        if name in old and worse(old[name], tensor):
            found.setdefault(id(tensor), name)
    return list(found.values())


def _new_shapes(before: _State, after: _State, vocabulary: _VocabularyRows) -> list[str]:
    names = _newly(before, after, lambda old, new: old.shape != new.shape)
    old, new = before.tensors, after.tensors
    return [
        f"shape of {name}: {old[name].shape} became {new[name].shape}"
        for name in sorted(names)
        if vocabulary.axis(old[name].shape, new[name].shape) is None
    ]


def _lost_rows(vocabulary: _VocabularyRows, needed: int | None) -> list[str]:
    """Lost rows that a token may need.

    :param needed: size of the tokenizer's vocabulary; None where there is no tokenizer.
    """
    lost = (vocabulary.after or 0) < (vocabulary.before or 0)
    return [vocabulary.difference] if lost and needed is None else []


def _sound(state: _State) -> str:
    return f"{len(state.parameters)} parameters are sound, the structure is unchanged"


def _new_types(before: _State, after: _State) -> list[str]:
    """Changes from or to a type that is no float, summed up: other precisions are how a checkpoint is stored."""
    counts: dict[str, int] = defaultdict(int)
    for name in before.parameters.keys() & after.parameters.keys():
        old, new = before.parameters[name].dtype, after.parameters[name].dtype
        if old != new and not ("float" in old and "float" in new):
            counts[f"{old.removeprefix('torch.')} became {new.removeprefix('torch.')}"] += 1
    return [f"dtype of {count} parameters: {change}" for change, count in sorted(counts.items())]


def _torn_ties(
    model: torch.nn.Module, before: frozenset[frozenset[str]], after: frozenset[frozenset[str]]
) -> list[str]:
    """Ties of the baseline that are gone, and whose tensors now differ; an exact copy is the same model."""
    torn: list[str] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for tie in before:
        if any(tie <= other for other in after) or not tie <= parameters.keys():
            continue
        first, *others = (parameters[name] for name in sorted(tie))
        if not all(first.shape == other.shape and bool((first == other).all()) for other in others):
            torn.append(" = ".join(sorted(tie)))
    return torn


def _new_ties(before: frozenset[frozenset[str]], after: frozenset[frozenset[str]]) -> list[str]:
    return [" = ".join(sorted(tie)) for tie in after if not any(tie <= other for other in before)]


def _embedding_rows(model: Any) -> int | None:
    from invarlock.api import input_embeddings

    embeddings: Any = input_embeddings(model)
    return None if embeddings is None else int(embeddings.weight.shape[0])


def _too_few_embeddings(before: _State, after: _State, vocabulary: int | None) -> list[str]:
    # A baseline whose tokenizer has entries without a row is as it is; what an edit took away is the edit's.
    rows = after.embedding_rows
    if rows is None or vocabulary is None or rows >= vocabulary or rows >= (before.embedding_rows or 0):
        return []
    return [f"{rows} embedding rows for a vocabulary of {vocabulary}"]
