"""Comparisons of checkpoints whose vocabularies or tokenizers are not the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from conftest import DEMO, read_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from invarlock.datasets.layout import UNSCORED, WindowLayout
from invarlock.datasets.same_text import Side, read_same_text
from invarlock.datasets.windows import make_windows
from invarlock.evaluation.passes import measure
from invarlock.evaluation.per_byte import over_same_text
from invarlock.reporting.report import json_schema
from invarlock.testing import architectures

BASELINE = DEMO / "checkpoint"
CHAPTERS = [json.loads(line)["text"] for line in (DEMO / "text.jsonl").read_text().splitlines()]
VOCABULARY = 320
SMALL = ("--set", "dataset.seq_len=32", "--set", "dataset.final_n=6", "--set", "dataset.preview_n=2")
GUARDS = ("--set", "guards.order=[invariants,reconstruction,spectral,rmt,variance]")
TEXT = ("--dataset", DEMO / "text.jsonl")
SOURCES = [TEXT, ("--generated",), ("--weights-only",)]


def byte_level(entries: int, *specials: str, prefix: str = "", regex: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=["<end>", *specials], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(CHAPTERS[:20], trainer)
    if prefix:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(prefix, bpe.token_to_id(prefix))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(VOCABULARY)


def roberta(**changes: Any) -> RobertaForMaskedLM:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**size, pad_token_id=0, eos_token_id=0, bos_token_id=0, **changes)).eval()


MASKED: dict[str, Callable[..., Any]] = {"bert": architectures.bert, "roberta": roberta}
BUILT: dict[str, Callable[..., Any]] = {
    "llama": architectures.llama,
    "gpt2": architectures.gpt2,
}


def built(architecture: str, rows: int = VOCABULARY) -> Any:
    return BUILT[architecture](vocab_size=rows, eos_token_id=0, bos_token_id=0)


def resized(model: Any, rows: int, fill: float | None = None) -> Any:
    """A copy with so many rows of embedding and head; added ones are random, or all of one number."""
    known = model.config.vocab_size
    edited = copy.deepcopy(model)
    edited.resize_token_embeddings(rows, mean_resizing=False)
    if fill is not None:
        for module in (edited.get_input_embeddings(), edited.get_output_embeddings()):
            module.weight.data[known:] = fill
    return edited


def saved(model: Any, tokenizer: Any, folder: str) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


@dataclass(frozen=True)
class Compared:
    code: int
    out: str
    report: dict[str, Any]

    @property
    def metric(self) -> dict[str, Any]:
        return self.report["metrics"]["primary"]

    def finding(self, source: str) -> dict[str, Any]:
        return next(each for each in self.report["verdict"]["findings"] if each["source"] == source)


@pytest.fixture
def comparing(invarlock) -> Callable[..., Compared]:
    def run(baseline: Path, subject: Path, *options: object) -> Compared:
        arguments = ("--baseline", baseline, "--subject", subject, *options, *SMALL, "--out", "out", "--force")
        done = invarlock("compare", *arguments)
        assert done.code in (0, 1), done.out + done.err
        report = read_report(Path("out"))
        jsonschema.validate(report, json_schema())
        return Compared(done.code, done.out, report)

    return run


# -- more rows, and fewer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=["text", "generated", "weights only"])
@pytest.mark.parametrize("architecture", BUILT)
@pytest.mark.parametrize(("rows", "fill"), [(384, None), (VOCABULARY + 1, 0.0)], ids=["padded", "one zero row"])
def test_a_padded_vocabulary_is_no_edit(comparing, tokenizer, architecture, source, rows, fill) -> None:
    model = built(architecture)
    baseline, subject = saved(model, tokenizer, "baseline"), saved(resized(model, rows, fill), tokenizer, "subject")
    found = comparing(baseline, subject, *source, *GUARDS, "--strict")
    assert (found.code, found.report["verdict"]["action"]) == (0, "continue"), found.out
    assert (
        f"{rows - VOCABULARY} embedding rows more than the baseline's 320"
        in found.finding("guard invariants")["message"]
    )
    added = f"{rows - VOCABULARY} rows added, the others unchanged"
    assert {module["change"] for module in found.report["edit"]["modules"]} == {"unchanged", added}
    if source != ("--weights-only",):
        assert found.metric["ratio"] == 1.0, "added rows take no share of the probability"


@pytest.mark.parametrize("source", SOURCES, ids=["text", "generated", "weights only"])
@pytest.mark.parametrize("architecture", BUILT)
def test_rows_that_no_token_has_may_go(comparing, tokenizer, architecture, source) -> None:
    model = built(architecture, 384)
    baseline, subject = saved(model, tokenizer, "baseline"), saved(resized(model, VOCABULARY), tokenizer, "subject")
    found = comparing(baseline, subject, *source, *GUARDS)
    # A model of random weights writes and reads tokens that its tokenizer lacks.
    if source == ("--generated",):
        assert "the model knows only 320 tokens" in found.out
        return
    assert found.code == 0, found.out
    assert "64 embedding rows fewer than the baseline's 384" in found.finding("guard invariants")["message"]
    by_name = {guard["name"]: guard for guard in found.report["guards"]}
    assert by_name["spectral"]["metrics"]["families"]["embed"]["largest_change"] < 1e-6
    assert by_name["invariants"]["action"] == by_name["spectral"]["action"] == "continue"


@pytest.mark.parametrize("source", [TEXT, ("--weights-only",)], ids=["text", "weights only"])
@pytest.mark.parametrize("architecture", BUILT)
def test_lost_rows_that_the_tokenizer_needs_abort(comparing, tokenizer, architecture, source) -> None:
    model = built(architecture)
    baseline, subject = saved(model, tokenizer, "baseline"), saved(resized(model, 319), tokenizer, "subject")
    found = comparing(baseline, subject, *source)
    assert (found.code, found.report["verdict"]["action"]) == (1, "abort")
    assert "319 embedding rows for a vocabulary of 320" in found.finding("guard invariants")["message"]


def test_lost_rows_warn_where_no_tokenizer_says_which_are_needed(comparing) -> None:
    model = built("gpt2", 384)
    baseline, subject = saved(model, None, "baseline"), saved(resized(model, VOCABULARY), None, "subject")
    found = comparing(baseline, subject, "--weights-only")
    assert found.finding("guard invariants")["action"] == "warn"
    assert "64 embedding rows fewer than the baseline's 384" in found.finding("guard invariants")["message"]


@pytest.mark.parametrize("architecture", BUILT)
def test_an_added_row_has_to_be_finite(comparing, tokenizer, architecture) -> None:
    model = built(architecture)
    subject = saved(resized(model, 384, float("nan")), tokenizer, "subject")
    found = comparing(saved(model, tokenizer, "baseline"), subject, *TEXT)
    assert (found.code, found.report["verdict"]["action"]) == (1, "abort")
    assert "NaN or Inf in" in found.finding("guard invariants")["message"]


@pytest.mark.parametrize("architecture", BUILT)
@pytest.mark.parametrize("rows", [384, VOCABULARY], ids=["more rows", "fewer rows"])
def test_a_shared_row_counts_beside_added_and_lost_ones(comparing, tokenizer, architecture, rows) -> None:
    model = built(architecture, 704 - rows)
    edited = resized(model, rows)
    edited.get_input_embeddings().weight.data[70] *= -4
    found = comparing(saved(model, tokenizer, "baseline"), saved(edited, tokenizer, "subject"), "--weights-only")
    by_name = {guard["name"]: guard for guard in found.report["guards"]}
    assert "1 row replaced" in by_name["spectral"]["message"]
    assert by_name["reconstruction"]["metrics"]["score"] > 0
    assert "nan" not in found.out
    changed = [module for module in found.report["edit"]["modules"] if module["change"].endswith("the others changed")]
    assert changed and all(module["relative_error"] > 0 for module in changed)


# -- each side with its own tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request, tokenizer, tmp_path_factory) -> Path:
    """A checkpoint that has learned what follows what, so that another token in its place shows."""
    model = built(request.param)
    ids = torch.tensor(tokenizer(" ".join(CHAPTERS[20:60]), verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        places = torch.randint(len(ids) - 33, (16,), generator=generator)
        batch = torch.stack([ids[place : place + 32] for place in places])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp(request.param)
    return saved(model.eval(), tokenizer, str(folder))


def with_words(folder: Path, order: Callable[[list[str]], Iterable[str]]) -> None:
    """Give the entries of a saved tokenizer's vocabulary the ids of an order."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    words = values["model"]["vocab"]
    values["model"]["vocab"] = {word: place for place, word in enumerate(order(sorted(words, key=words.__getitem__)))}
    path.write_text(json.dumps(values))


def rotated(words: list[str]) -> list[str]:
    return [*words[:100], *words[101:], words[100]]


def copied(trained: Path, model: Any = None) -> Path:
    return saved(
        model or AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained), "subject"
    )


def test_rotated_ids_are_measured_with_the_subjects_tokenizer_and_rejected(comparing, trained) -> None:
    with_words(subject := copied(trained), rotated)
    found = comparing(trained, subject, *TEXT)
    assert (found.code, found.report["verdict"]["decided_by"]) == (1, "primary metric")
    assert found.metric["unit"] == "byte"
    assert "perplexity per byte" in found.out
    assert "predictions not measured" in found.finding("predictions")["message"]
    assert found.finding("tokenizer")["action"] == "warn"
    assert not found.report["verdict"]["suspects"], "no weight has changed"


def test_the_baselines_tokenizer_is_used_for_both_where_that_is_asked_for(comparing, trained) -> None:
    with_words(subject := copied(trained), rotated)
    found = comparing(trained, subject, *TEXT, "--tokenizer", "baseline")
    assert (found.code, found.metric["ratio"], found.metric["unit"]) == (0, 1.0, "token")
    assert found.finding("tokenizer")["action"] == "warn"
    assert "the baseline's was used for both" in found.finding("tokenizer")["message"]


@pytest.mark.parametrize("source", [("--generated",), ("--weights-only",)])
def test_without_text_ids_that_moved_are_rejected(comparing, trained, source) -> None:
    with_words(subject := copied(trained), rotated)
    found = comparing(trained, subject, *source)
    assert (found.code, found.report["verdict"]["decided_by"]) == (1, "guard serving")
    assert "220 tokens have another id" in found.finding("guard serving")["message"]


def test_rows_and_ids_that_moved_together_have_the_same_loss_per_byte(comparing, trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    order = torch.tensor([*range(100), *range(101, VOCABULARY), 100])
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        module.weight = nn.Parameter(module.weight.detach()[order])
    model.tie_weights()
    with_words(subject := copied(trained, model), rotated)
    found = comparing(trained, subject, *TEXT)
    assert found.metric["unit"] == "byte"
    assert found.metric["ratio"] == pytest.approx(1, abs=1e-5)
    assert found.metric["action"] == "continue"


def test_text_that_is_split_otherwise_is_compared_per_byte(comparing, invarlock, trained) -> None:
    subject = copied(trained)
    byte_level(VOCABULARY, regex=False).save_pretrained(subject)
    found = comparing(trained, subject, *TEXT)
    windows = found.report["metrics"]["windows"]
    assert found.metric["tokens"] == sum(windows["tokens"])
    rise = (sum(windows["edited"]) - sum(windows["baseline"])) / sum(windows["bytes"])
    assert found.metric["ratio"] == pytest.approx(np.exp(rise))
    per_token = sum(windows["tokens"]) / sum(windows["bytes"])
    assert found.metric["limit"] == pytest.approx(1.1**per_token)
    assert invarlock("verify", "out").code == 0
    again = invarlock("verify", "out", "--baseline", trained, "--subject", subject)
    assert again.code == 0, again.out
    assert "checked      losses of the edited model, measured again" in again.out
    report = json.loads(Path("out/report.json").read_text())
    report["metrics"]["windows"]["bytes"][0] += 1
    Path("out/report.json").write_text(json.dumps(report))
    assert invarlock("verify", "out", "--baseline", trained, "--subject", subject).code == 1


def test_a_subject_without_a_tokenizer_is_measured_with_the_baselines(comparing, trained) -> None:
    subject = saved(AutoModelForCausalLM.from_pretrained(trained), None, "subject")
    found = comparing(trained, subject, *TEXT)
    assert (found.code, found.metric["ratio"]) == (0, 1.0)
    assert "the subject has none; the baseline's was used" in found.finding("tokenizer")["message"]


def test_a_tokenizer_that_needs_rows_that_are_not_there_aborts(comparing, trained) -> None:
    subject = copied(trained)
    byte_level(VOCABULARY + 40).save_pretrained(subject)
    found = comparing(trained, subject, *TEXT)
    assert (found.code, found.report["verdict"]["action"]) == (1, "abort")
    assert "its own tokenizer does not fit it" in found.finding("primary metric")["message"]


def test_more_entries_that_leave_the_others_alone_are_no_harm(comparing, trained, tokenizer) -> None:
    model = resized(AutoModelForCausalLM.from_pretrained(trained), VOCABULARY + 2)
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    found = comparing(trained, saved(model, more, "subject"), *TEXT, "--strict")
    assert (found.code, found.metric["ratio"], found.metric["unit"]) == (0, 1.0, "token"), found.out


@pytest.fixture(scope="module")
def translating(tokenizer, tmp_path_factory) -> Path:
    model = architectures.t5(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0)
    return saved(model, tokenizer, str(tmp_path_factory.mktemp("t5")))


def test_a_target_is_compared_per_byte_of_the_same_text(comparing, invarlock, translating) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(translating)
    subject = saved(model, byte_level(VOCABULARY, regex=False), "subject")
    found = comparing(translating, subject, *TEXT)
    windows = found.report["metrics"]["windows"]
    assert (found.metric["kind"], found.metric["unit"]) == ("target_perplexity", "byte")
    assert all(
        0 < tokens < 16 and tokens < size for tokens, size in zip(windows["tokens"], windows["bytes"], strict=True)
    )
    rise = (sum(windows["edited"]) - sum(windows["baseline"])) / sum(windows["bytes"])
    assert found.metric["ratio"] == pytest.approx(np.exp(rise))
    again = invarlock("verify", "out", "--baseline", translating, "--subject", subject)
    assert again.code == 0, again.out


def test_rows_of_a_target_that_moved_with_their_ids_have_the_same_loss(comparing, translating) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(translating)
    order = torch.tensor([*range(100), *range(101, VOCABULARY), 100])
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        module.weight = nn.Parameter(module.weight.detach()[order])
    model.tie_weights()
    with_words(subject := saved(model, AutoTokenizer.from_pretrained(translating), "subject"), rotated)
    found = comparing(translating, subject, *TEXT)
    assert (found.metric["unit"], found.metric["action"]) == ("byte", "continue")
    assert found.metric["ratio"] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def filling(request, tmp_path_factory) -> Path:
    """A masked model that knows which tokens are frequent."""
    side = byte_level(VOCABULARY, "<mask>", "<unk>")
    side.add_special_tokens({"mask_token": "<mask>", "unk_token": "<unk>"})
    model = MASKED[request.param](vocab_size=VOCABULARY)
    counts = torch.bincount(
        torch.tensor(side(" ".join(CHAPTERS[:60]), verbose=False)["input_ids"]), minlength=VOCABULARY
    )
    model.get_output_embeddings().bias.data = (counts + 0.5).log()
    return saved(model, side, str(tmp_path_factory.mktemp(request.param)))


def moved(folder: Path) -> Any:
    """A masked model whose rows, and the biases of its head, are where :func:`rotated` puts the ids."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    order = torch.tensor([*range(100), *range(101, VOCABULARY), 100])
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows.weight.data, head.bias.data = rows.weight.data[order], head.bias.data[order]
    model.tie_weights()
    return model


def test_hidden_text_is_compared_per_byte(comparing, invarlock, filling) -> None:
    subject = saved(moved(filling), AutoTokenizer.from_pretrained(filling), "subject")
    with_words(subject, rotated)
    found = comparing(filling, subject, *TEXT)
    assert (found.metric["kind"], found.metric["unit"], found.metric["action"]) == (
        "masked_perplexity", "byte", "continue",
    )  # fmt: skip
    assert found.metric["ratio"] == pytest.approx(1, abs=1e-5)
    again = invarlock("verify", "out", "--baseline", filling, "--subject", subject)
    assert again.code == 0, again.out


def test_a_masked_model_with_ids_that_moved_alone_is_rejected(comparing, filling) -> None:
    subject = saved(AutoModelForMaskedLM.from_pretrained(filling), AutoTokenizer.from_pretrained(filling), "subject")
    with_words(subject, rotated)
    found = comparing(filling, subject, *TEXT)
    assert (found.code, found.report["verdict"]["decided_by"]) == (1, "primary metric"), found.out
    assert found.metric["unit"] == "byte"


# -- the same text -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The section ``dataset`` of a configuration."""

    provider: str = "demo"
    seq_len: int = 24
    stride: int | None = 31
    preview_n: int = 2
    final_n: int = 5
    seed: int = 3


MANY_SCRIPTS = [
    "Grüße aus Köln, naïve Straße — 3 €\n\n  zwei  Leerzeichen",
    "בראשית ברא אלהים את השמים ואת הארץ",
    "天地玄黃,宇宙洪荒。日月盈昃 🙂🙃 मुझे हिन्दी आती है",
    "def f(x):\n\treturn x ** 2  # 4096",
] * 6  # fmt: skip


@pytest.mark.parametrize("documents", [CHAPTERS, MANY_SCRIPTS], ids=["english", "many scripts"])
@pytest.mark.parametrize(
    "other",
    [
        byte_level(300),
        byte_level(400, "<begin>", prefix="<begin>"),
        byte_level(360, regex=False),
    ],
    ids=["fewer entries", "more entries and a prefix", "words not kept apart"],
)
def test_both_sides_are_compared_over_the_same_bytes(tokenizer, other, documents) -> None:
    model, data = built("gpt2", 400), Data()
    ours, theirs = (
        Side(each, WindowLayout.of(model, each, task="causal", length=data.seq_len)) for each in (tokenizer, other)
    )
    same = read_same_text(data, documents, ours, theirs, most=None)
    preview, final = make_windows(data, model, tokenizer, task="causal", documents=documents)
    passes = [measure(model, preview[:0], windows, task="causal") for windows in (final, same.windows)]
    before, after = over_same_text(*passes, same.shared)
    assert (before.bytes == after.bytes).all() and (before.bytes > 15).all()
    for row, shared in enumerate(same.shared):
        texts = set()
        for side, measured, windows, tokens, inside in (
            (tokenizer, before, final, passes[0], shared.baseline),
            (other, after, same.windows, passes[1], shared.subject),
        ):
            texts.add(text := side.decode(windows.input_ids[row][torch.from_numpy(inside)]))
            assert len(text.encode()) == measured.bytes[row]
            expected = tokens.position_losses[row, :-1][inside[1:]].astype(float).sum()
            assert measured.losses[row] == pytest.approx(expected)
        assert len(texts) == 1


@pytest.mark.parametrize("documents", [CHAPTERS, MANY_SCRIPTS], ids=["english", "many scripts"])
@pytest.mark.parametrize("regex", [True, False])
def test_both_sides_predict_the_same_hidden_bytes(tokenizer, regex, documents) -> None:
    model, data = architectures.bert(vocab_size=400), Data()
    sides = [byte_level(entries, "<mask>", regex=split) for entries, split in ((VOCABULARY, True), (300, regex))]
    for side in sides:
        side.add_special_tokens({"mask_token": "<mask>"})
    layouts = [WindowLayout.of(model, each, task="masked", length=data.seq_len) for each in sides]
    same = read_same_text(data, documents, *map(Side, sides, layouts), most=None)
    _, final = make_windows(data, model, sides[0], task="masked", documents=documents)
    assert any(shared.bytes for shared in same.shared)
    for row, shared in enumerate(same.shared):
        labels = final.labels[row][torch.from_numpy(shared.baseline)]
        own = same.windows.labels[row] != UNSCORED
        assert own.tolist() == shared.subject.tolist()
        assert (same.windows.input_ids[row][own] == sides[1].mask_token_id).all()
        texts = [sides[0].decode(labels), sides[1].decode(same.windows.labels[row][own])]
        assert texts[0] == texts[1] and len(texts[0].encode()) == shared.bytes
        assert (labels != UNSCORED).all(), "what the baseline does not hide is not compared"


@pytest.mark.parametrize(("task", "scored"), [("causal", 24), ("seq2seq", 12)])
def test_the_same_tokenizer_gives_the_same_tokens_and_losses(tokenizer, task, scored) -> None:
    model, data = built("llama") if task == "causal" else architectures.t5(vocab_size=VOCABULARY), Data()
    side = Side(tokenizer, WindowLayout.of(model, tokenizer, task=task, length=data.seq_len))
    same = read_same_text(data, CHAPTERS, side, side, most=None)
    _, final = make_windows(data, model, tokenizer, task=task, documents=CHAPTERS)
    passes = [measure(model, final[:0], windows, task=task) for windows in (final, same.windows)]
    before, after = over_same_text(*passes, same.shared, task=task)
    assert (before.tokens >= scored - 8).all(), "a token or two at each end are left out"
    assert after.losses == pytest.approx(before.losses, rel=1e-4), "a window may begin a token earlier"


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand_is_not_measured(comparing, module, trained) -> None:
    module(
        "slow",
        "from plugins_builtin.adapters.hf import HF_Causal_Adapter\n"
        "class Slow:\n"
        "    eos_token_id, mask_token_id, all_special_ids = None, None, []\n"
        "    def __init__(self, inner, shift): self.inner, self.shift = inner, shift\n"
        "    def __len__(self): return len(self.inner)\n"
        "    def __call__(self, text, add_special_tokens=False, verbose=False):\n"
        "        ids = self.inner(text, add_special_tokens=False, verbose=False)['input_ids']\n"
        "        return {'input_ids': [max(token - self.shift, 1) for token in ids]}\n"
        "class SlowAdapter(HF_Causal_Adapter):\n"
        "    name = 'slow'\n"
        "    def load_tokenizer(self, model_id, **options):\n"
        "        return Slow(super().load_tokenizer(model_id, **options), model_id == 'subject')\n",
    )
    found = comparing(trained, copied(trained), *TEXT, "-p", "slow", "--set", "model.adapter=slow")
    assert (found.code, found.report["verdict"]["action"]) == (1, "abort")
    assert "--tokenizer baseline" in found.finding("primary metric")["message"]
