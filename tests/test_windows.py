"""From a dataset, or from the model itself, to windows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import texts_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import invarlock
import invarlock.datasets.windows
from invarlock.core.errors import PluginError, UsageError
from invarlock.datasets.generated import write_text
from invarlock.datasets.layout import WindowLayout, Windows, encode
from invarlock.datasets.windows import PIECE
from invarlock.models import facts as traits
from invarlock.models.batches import batch_size, cached_batch_size
from invarlock.models.facts import Predicted

DEMO = Path(invarlock.__file__).parent / "demo" / "text.jsonl"
CHAPTERS = [json.loads(line)["text"] for line in DEMO.read_text().splitlines()]
VOCABULARY = 320


@dataclass(frozen=True)
class Data:
    """The section ``dataset`` of a configuration."""

    provider: str = "demo"
    path: str | None = None
    name: str | None = None
    text_field: str = "text"
    split: str = "train"
    seq_len: int = 32
    stride: int = 32
    preview_n: int = 3
    final_n: int = 5
    seed: int = 42


def make_windows(data: Data, model: nn.Module, tokenizer: Any, *, task: Predicted) -> tuple[Windows, Windows]:
    return invarlock.datasets.windows.make_windows(data, model, tokenizer, task=task, documents=texts_of(data))


def tokenizer(specials: list[str], template: str = "$A", **names: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the special tokens of a template around a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CHAPTERS[:4], trainer)
    if template != "$A":
        ids = [(token, bpe.token_to_id(token)) for token in specials]
        bpe.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=64, **names)


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(["<end>"], eos_token="<end>")


@pytest.fixture(scope="module")
def llama_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(["<s>", "</s>"], "<s> $A", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer(["[PAD]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]", **names)


@pytest.fixture(scope="module")
def t5_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def llama(**settings: Any) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64} | settings
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=16, max_position_embeddings=64,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def t5(**settings: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes | {"decoder_start_token_id": 0} | settings))


def same(one: Windows, other: Windows) -> bool:
    pairs = [
        (one.input_ids, other.input_ids),
        (one.attention_mask, other.attention_mask),
        (one.labels, other.labels),
        (one.decoder_input_ids, other.decoder_input_ids),
    ]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def refused(data: Data, tokenizer: Any, *, model: nn.Module | None = None, task: Predicted = "causal") -> str:
    """The message of a mistake: one line that names what to change."""
    with pytest.raises(UsageError) as error:
        make_windows(data, model or llama(), tokenizer, task=task)
    message = str(error.value)
    assert "\n" not in message
    return message


# Windows of text


def test_windows_have_the_shapes_and_numbers_asked_for(gpt2_tokenizer: Any) -> None:
    preview, final = make_windows(Data(), gpt2(), gpt2_tokenizer, task="causal")
    assert (len(preview), len(final)) == (3, 5)
    for windows in (preview, final):
        assert windows.input_ids.shape[1] == 32
        assert windows.input_ids.dtype == windows.attention_mask.dtype == windows.labels.dtype == torch.int64
        assert torch.equal(windows.labels, windows.input_ids)
        assert windows.attention_mask.all()
        assert windows.decoder_input_ids is None


def test_the_seed_decides_all(gpt2_tokenizer: Any, bert_tokenizer: Any) -> None:
    for model, words, task in [(gpt2(), gpt2_tokenizer, "causal"), (bert(), bert_tokenizer, "masked")]:
        preview, final = make_windows(Data(), model, words, task=task)
        again, final_again = make_windows(Data(), model, words, task=task)
        other, _ = make_windows(Data(seed=43), model, words, task=task)
        assert same(preview, again) and same(final, final_again)
        assert not same(preview, other)


def test_torchs_own_random_state_is_left_alone(bert_tokenizer: Any) -> None:
    model = bert()
    before = torch.get_rng_state()
    make_windows(Data(), model, bert_tokenizer, task="masked")
    assert torch.equal(before, torch.get_rng_state())


def test_no_token_is_in_two_windows(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    numbers = [f"{number:04d}" for number in range(2000)]
    (tmp_path / "numbers.txt").write_text("\n".join(numbers))
    data = Data("local_text", str(tmp_path / "numbers.txt"), preview_n=20, final_n=100)
    preview, final = make_windows(data, gpt2(), gpt2_tokenizer, task="causal")
    rows = [gpt2_tokenizer.decode(row) for row in [*preview.input_ids, *final.input_ids]]
    seen = Counter(number for row in rows for number in re.findall(r"(?<=\n)\d{4}(?=\n)", row))
    assert len(seen) > 500
    assert set(seen.values()) == {1}


def test_windows_are_shuffled_so_that_the_preview_is_not_the_beginning(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    text = "\n".join(f"{number:04d}" for number in range(2000))
    (tmp_path / "numbers.txt").write_text(text)
    data = Data("local_text", str(tmp_path / "numbers.txt"), preview_n=4, final_n=60)
    preview, final = make_windows(data, gpt2(), gpt2_tokenizer, task="causal")
    stream = torch.tensor(encode(gpt2_tokenizer, text)[: 64 * 32]).view(64, 32)
    got = torch.cat([preview.input_ids, final.input_ids])
    assert sorted(got.tolist()) == sorted(stream.tolist())
    assert not torch.equal(got, stream)


def test_a_larger_stride_skips_text(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(CHAPTERS[0])
    data = Data("local_text", str(tmp_path / "a.txt"), stride=50, preview_n=1, final_n=3)
    windows = make_windows(data, gpt2(), gpt2_tokenizer, task="causal")
    stream = encode(gpt2_tokenizer, CHAPTERS[0])
    expected = [stream[start : start + 32] for start in (0, 50, 100, 150)]
    assert sorted(torch.cat([part.input_ids for part in windows]).tolist()) == sorted(expected)


def test_documents_are_joined_with_the_end_of_text(tmp_path: Path, gpt2_tokenizer: Any, bert_tokenizer: Any) -> None:
    write_jsonl(tmp_path / "short.jsonl", [{"text": "In the beginning"}] * 50)
    data = Data("local_jsonl", str(tmp_path / "short.jsonl"), preview_n=1, final_n=1)
    preview, _ = make_windows(data, gpt2(), gpt2_tokenizer, task="causal")
    words = encode(gpt2_tokenizer, "In the beginning")
    stream = ([*words, gpt2_tokenizer.eos_token_id] * 32)[: 2 * 32]
    assert preview.input_ids[0].tolist() in (stream[:32], stream[32:])

    preview, _ = make_windows(data, bert(), bert_tokenizer, task="causal")
    assert set(preview.input_ids[0, 1:-1].tolist()) <= set(encode(bert_tokenizer, "In the beginning"))


def test_reading_stops_as_soon_as_there_is_enough(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    read: list[int] = []

    class Counting:
        eos_token_id, mask_token_id, all_special_ids = None, None, gpt2_tokenizer.all_special_ids

        def __call__(self, text: str, **settings: Any) -> Any:
            read.append(len(text))
            return gpt2_tokenizer(text, **settings)

    (tmp_path / "long.txt").write_text("\n".join(CHAPTERS * 8))
    make_windows(Data("local_text", str(tmp_path / "long.txt")), gpt2(), Counting(), task="causal")
    assert max(read) < PIECE + 2000 and sum(read) < 2 * PIECE
    read.clear()
    make_windows(Data(preview_n=1, final_n=1), gpt2(), Counting(), task="causal")
    assert sum(read) < 20_000


def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    text = "\n".join(CHAPTERS)
    assert len(text) > 2 * PIECE
    (tmp_path / "long.txt").write_text(text)
    stream = encode(gpt2_tokenizer, text)
    data = Data("local_text", str(tmp_path / "long.txt"), preview_n=1, final_n=len(stream) // 32 - 1)
    windows = make_windows(data, gpt2(), gpt2_tokenizer, task="causal")
    expected = torch.tensor(stream[: len(stream) // 32 * 32]).view(-1, 32).tolist()
    assert sorted(torch.cat([part.input_ids for part in windows]).tolist()) == sorted(expected)


def test_batches_cover_all_windows_in_order(gpt2_tokenizer: Any) -> None:
    _, final = make_windows(Data(final_n=7), gpt2(), gpt2_tokenizer, task="causal")
    batches = list(final.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.inputs()["input_ids"] for batch in batches]), final.input_ids)
    assert set(batches[0].inputs()) == {"input_ids", "attention_mask"}


# Special tokens, and what is scored


def test_a_prefix_is_inside_the_window_and_not_scored(llama_tokenizer: Any) -> None:
    preview, _ = make_windows(Data(), llama(), llama_tokenizer, task="causal")
    assert preview.input_ids.shape[1] == 32
    assert (preview.input_ids[:, 0] == llama_tokenizer.bos_token_id).all()
    assert (preview.labels[:, 0] == -100).all()
    assert torch.equal(preview.labels[:, 1:], preview.input_ids[:, 1:])


def test_masks_are_15_percent_of_the_ordinary_tokens(bert_tokenizer: Any) -> None:
    data = Data(seq_len=62, stride=62, preview_n=2, final_n=40)
    _, final = make_windows(data, bert(), bert_tokenizer, task="masked")
    scored = final.labels != -100
    assert (scored.sum(dim=1) == 9).all()
    assert torch.equal(scored, final.input_ids == bert_tokenizer.mask_token_id)
    assert not torch.isin(final.labels[scored], torch.tensor(bert_tokenizer.all_special_ids)).any()
    assert (final.input_ids[:, 0] == bert_tokenizer.cls_token_id).all()
    assert (final.input_ids[:, -1] == bert_tokenizer.sep_token_id).all()
    # Masks fall everywhere: 360 of them miss a given one of 60 places with a probability of 0.2 %.
    assert scored.any(dim=0).sum() > 55


def test_a_short_window_still_has_one_mask(bert_tokenizer: Any) -> None:
    _, final = make_windows(Data(seq_len=4, stride=4), bert(), bert_tokenizer, task="masked")
    assert ((final.labels != -100).sum(dim=1) == 1).all()


def test_joining_tokens_inside_a_window_are_never_masked() -> None:
    layout = WindowLayout(8, prefix=(1,), suffix=(2,), special=(0, 1, 2, 3), mask=3)
    text = torch.tensor([[2, 2, 9, 2, 2, 2]] * 20)
    windows = layout.windows(text, seed=0)
    assert (windows.input_ids[:, 3] == 3).all()
    assert ((windows.labels != -100).sum(dim=1) == 1).all()


def test_seq2seq_halves_are_source_and_target(t5_tokenizer: Any) -> None:
    preview, final = make_windows(Data(), t5(), t5_tokenizer, task="seq2seq")
    end = t5_tokenizer.eos_token_id
    for windows in (preview, final):
        assert windows.input_ids.shape[1] == windows.labels.shape[1] == 16
        assert (windows.input_ids[:, -1] == end).all()
        assert (windows.labels[:, -1] == -100).all()
        assert (windows.labels[:, :-1] != -100).all()
        assert windows.decoder_input_ids is not None
        assert (windows.decoder_input_ids[:, 0] == 0).all()
        assert torch.equal(windows.decoder_input_ids[:, 1:], windows.labels[:, :-1])
    assert set(preview.inputs()) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_the_target_follows_its_source(tmp_path: Path, t5_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(CHAPTERS[0])
    data = Data("local_text", str(tmp_path / "a.txt"), preview_n=1, final_n=1)
    preview, final = make_windows(data, t5(), t5_tokenizer, task="seq2seq")
    stream = encode(t5_tokenizer, CHAPTERS[0])
    for windows in (preview, final):
        both = [*windows.input_ids[0, :-1].tolist(), *windows.labels[0, :-1].tolist()]
        assert both in (stream[:30], stream[30:60])


def test_a_seq2seq_prefix_reaches_the_decoder_and_is_not_scored() -> None:
    windows = WindowLayout(12, prefix=(0,), suffix=(2,), special=(0, 2), start=2).windows(
        torch.arange(10, 18)[None], seed=0
    )
    assert windows.input_ids.tolist() == [[0, 10, 11, 12, 13, 2]]
    assert windows.labels.tolist() == [[-100, 14, 15, 16, 17, -100]]
    assert windows.decoder_input_ids is not None
    assert windows.decoder_input_ids.tolist() == [[2, 0, 14, 15, 16, 17]]


# Providers


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_local_jsonl_reads_the_field_named(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"id": n, "body": text} for n, text in enumerate(CHAPTERS)])
    data = Data("local_jsonl", str(tmp_path / "a.jsonl"), text_field="body")
    assert all(map(same, make_windows(data, gpt2(), gpt2_tokenizer, task="causal"),
                   make_windows(Data(), gpt2(), gpt2_tokenizer, task="causal")))  # fmt: skip


def test_local_jsonl_takes_blank_lines_and_unicode_line_ends(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    line = json.dumps({"text": "a\u2028b\u0085c " * 40}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    data = Data("local_jsonl", str(tmp_path / "a.jsonl"), preview_n=1, final_n=1)
    make_windows(data, gpt2(), gpt2_tokenizer, task="causal")


def test_hf_reads_a_local_folder(tmp_path: Path, gpt2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in CHAPTERS])
    data = Data("hf", str(folder))
    assert all(map(same, make_windows(data, gpt2(), gpt2_tokenizer, task="causal"),
                   make_windows(Data(), gpt2(), gpt2_tokenizer, task="causal")))  # fmt: skip

    assert "dataset.path: cannot load" in (said := refused(replace(data, split="tset"), gpt2_tokenizer))
    assert "split tset" in said and "train" in said
    assert "name other" in refused(replace(data, name="other"), gpt2_tokenizer)
    said = refused(replace(data, text_field="txt"), gpt2_tokenizer)
    assert said.startswith("dataset.text_field: no 'txt' in") and "did you mean 'text'?" in said
    assert "cannot load /no/such/folder" in refused(replace(data, path="/no/such/folder"), gpt2_tokenizer)
    assert refused(Data("hf"), gpt2_tokenizer).startswith("dataset.path: is required by provider hf")


def test_hf_without_network_says_how_to_allow_it(gpt2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(Data("hf", "nobody/nothing"), gpt2_tokenizer)
    assert said.startswith("dataset.path: nobody/nothing") and "--allow-network" in said


def test_hf_without_its_library_says_what_to_install(gpt2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install 'invarlock[hf]'" in refused(Data("hf", "wikitext"), gpt2_tokenizer)


# Mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"dataset\.path: \S+/a\.jsonl, line 2: not JSON: Expecting value"),
        ('{"text": "a"}\n\n["a"]\n', r"dataset\.path: \S+, line 3: a list; one object per line is expected"),
        ('{"txt": "a", "id": 1}\n', r"dataset\.text_field: no 'text' in \S+, line 1; did you mean 'txt'\?; .*txt, id"),
        ("{}\n", r"dataset\.text_field: no 'text' in \S+, line 1; there is nothing"),
        ('{"text": ["a"]}\n', r"dataset\.text_field: 'text' holds a list, not text"),
        ('{"text": " "}\n\n', r"dataset: provider local_jsonl returned no text"),
        ("", r"dataset: provider local_jsonl returned no text"),
    ],
)
def test_a_bad_jsonl_file_is_said(tmp_path: Path, gpt2_tokenizer: Any, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert re.match(message, refused(Data("local_jsonl", str(tmp_path / "a.jsonl")), gpt2_tokenizer))


def test_a_bad_path_is_said(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    for provider in ("local_jsonl", "local_text"):
        assert "dataset.path: is required by provider local_" in refused(Data(provider), gpt2_tokenizer)
        assert "does not exist" in refused(Data(provider, str(tmp_path / "none")), gpt2_tokenizer)
        assert "is a folder" in refused(Data(provider, str(tmp_path)), gpt2_tokenizer)
        assert "is not UTF-8 text (byte 3)" in refused(Data(provider, str(tmp_path / "latin1.txt")), gpt2_tokenizer)
        assert "cannot be read" in refused(Data(provider, str(tmp_path / "latin1.txt" / "x")), gpt2_tokenizer)


def test_too_little_text_is_said_with_the_number_there_is(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    words = encode(gpt2_tokenizer, CHAPTERS[0])
    (tmp_path / "a.txt").write_text(CHAPTERS[0])
    said = refused(Data("local_text", str(tmp_path / "a.txt"), final_n=997), gpt2_tokenizer)
    assert f"enough for {(len(words) + 1) // 32} windows of 32 tokens, 1000 are asked for" in said
    assert "dataset.preview_n (3)" in said and "dataset.final_n (997)" in said and "dataset.seq_len" in said


def test_an_unknown_provider_is_said_with_the_nearest(gpt2_tokenizer: Any) -> None:
    assert "did you mean 'local_jsonl'?" in refused(Data("local_json"), gpt2_tokenizer)


def test_lengths_that_do_not_fit_are_said(gpt2_tokenizer: Any, bert_tokenizer: Any, t5_tokenizer: Any) -> None:
    assert refused(Data(stride=16), gpt2_tokenizer).startswith("dataset.stride: 16 is less than dataset.seq_len (32)")
    for provider in ("demo", "generated"):
        data = Data(provider, seq_len=65, stride=65)
        for model in (gpt2(), llama(), mixtral(), gpt_oss()):
            assert "dataset.seq_len: 65 is more than the 64 tokens" in refused(data, gpt2_tokenizer, model=model)
    short = Data(seq_len=3, stride=3)
    assert refused(short, bert_tokenizer, model=bert(), task="masked").startswith("dataset.seq_len: 3 leaves less")
    assert refused(short, t5_tokenizer, model=t5(), task="seq2seq").startswith("dataset.seq_len: 3 leaves less")


def test_what_a_model_or_tokenizer_lacks_is_said(gpt2_tokenizer: Any, t5_tokenizer: Any) -> None:
    assert "it has no tokenizer" in refused(Data(), None)
    assert "mask token" in refused(Data(), gpt2_tokenizer, model=bert(), task="masked")
    assert "mask token" in refused(Data("generated"), None, model=bert(), task="masked")
    startless = t5(decoder_start_token_id=None)
    assert "decoder_start_token_id" in refused(Data(), t5_tokenizer, model=startless, task="seq2seq")
    small = refused(Data(), gpt2_tokenizer, model=llama(vocab_size=100))
    assert re.match(r"its tokenizer does not fit it: .* token \d+, and the model knows only 100 tokens", small)


def test_a_tokenizer_without_recognizable_special_tokens_is_said(gpt2_tokenizer: Any) -> None:
    class Scrambling:
        eos_token_id, mask_token_id, all_special_ids = 0, None, (0,)

        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
            ids = list(range(1, 1 + len(text)))
            return {"input_ids": ids[::-1] if add_special_tokens else ids}

    assert "does not keep the text 'A a 1' whole" in refused(Data(), Scrambling())


# What a model is


def test_tasks_are_told_from_the_model() -> None:
    assert [traits.task_of(model) for model in (gpt2(), mixtral(), bert(), t5())] == [
        "causal", "causal", "masked", "seq2seq",
    ]  # fmt: skip
    assert traits.task_of(nn.Linear(1, 1)) == "causal"


def test_contexts_are_told_from_the_model() -> None:
    assert traits.context_of(t5()) is None
    assert traits.context_of(nn.Linear(1, 1)) is None
    roberta = RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, max_position_embeddings=66)  # fmt: skip
    assert traits.context_of(RobertaForMaskedLM(roberta)) == 64


def test_a_model_without_a_vocabulary_is_said() -> None:
    with pytest.raises(PluginError, match=r"^Linear: .*config\.vocab_size"):
        traits.vocabulary_of(nn.Linear(1, 1))


def test_batches_are_bounded_by_logits_and_by_tokens() -> None:
    assert batch_size(llama(vocab_size=1000), 256) == 8
    assert batch_size(llama(vocab_size=50_000, hidden_size=8), 256) == 2
    assert batch_size(llama(vocab_size=200_000, hidden_size=8), 1024) == 1


def test_batches_with_a_cache_are_bounded_by_keys_and_values() -> None:
    model = llama()
    config = model.config
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert cached_batch_size(model, 256) == 2**30 // (256 * of_token)
    assert cached_batch_size(model, 1 << 40) == 1
    model.config.num_hidden_layers = 0
    assert cached_batch_size(model, 256) == batch_size(model, 256), "as without a cache, where its size is not known"


def test_text_that_a_device_has_no_memory_for_is_written_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, layout = llama(), WindowLayout(16)
    expected = write_text(model, layout, 9, seed=0)
    forward, most = model.forward, 2

    def with_little_memory(input_ids: Any = None, past_key_values: Any = None, **inputs: Any) -> Any:
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(input_ids=input_ids, past_key_values=past_key_values, **inputs)

    monkeypatch.setattr(model, "forward", with_little_memory)
    assert torch.equal(write_text(model, layout, 9, seed=0), expected)
    # Said once in a process: no other test has so many.
    assert "no memory for 9 windows at once; going on with 4" in caplog.text
    most = 0
    with pytest.raises(UsageError, match=r"^model\.device: cpu has no memory for a batch of 1 x 16 tokens"):
        write_text(model, layout, 9, seed=0)


# Windows that the model writes itself

MAKERS: dict[str, tuple[Callable[[], nn.Module], str | None, Predicted]] = {
    "gpt2": (gpt2, None, "causal"),
    "llama": (llama, "llama_tokenizer", "causal"),
    "llama without a tokenizer": (llama, None, "causal"),
    "mixtral": (mixtral, None, "causal"),
    "gpt_oss": (gpt_oss, None, "causal"),
    "bert": (bert, "bert_tokenizer", "masked"),
    "t5": (t5, "t5_tokenizer", "seq2seq"),
    "t5 without a tokenizer": (t5, None, "seq2seq"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_model_writes_its_own_windows(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    maker, words, task = MAKERS[kind]
    torch.manual_seed(0)
    model = maker().train()
    words = request.getfixturevalue(words) if words else None
    settings = model.generation_config.to_dict() if hasattr(model, "generation_config") else None
    state, weights = torch.get_rng_state(), {name: w.clone() for name, w in model.state_dict().items()}
    capfd.readouterr()

    data = Data("generated", seq_len=24, stride=24)
    preview, final = make_windows(data, model, words, task=task)
    again, _ = make_windows(data, model, words, task=task)
    other, _ = make_windows(replace(data, seed=1), model, words, task=task)

    assert (len(preview), len(final)) == (3, 5)
    assert preview.input_ids.shape == (3, 12 if task == "seq2seq" else 24)
    assert same(preview, again) and not same(preview, other)
    assert len({tuple(row) for row in torch.cat([preview.labels, final.labels]).tolist()}) == 8
    assert int(final.input_ids.min()) >= 0 and int(final.input_ids.max()) < VOCABULARY
    assert (model.generation_config.to_dict() if settings is not None else None) == settings
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_text_begins_after_the_tokenizers_prefix_or_the_beginning_token(llama_tokenizer: Any) -> None:
    preview, _ = make_windows(Data("generated"), llama(bos_token_id=7), llama_tokenizer, task="causal")
    assert (preview.input_ids[:, 0] == llama_tokenizer.bos_token_id).all()
    assert (preview.labels[:, 0] == -100).all()
    preview, _ = make_windows(Data("generated"), llama(bos_token_id=7), None, task="causal")
    assert (preview.input_ids[:, 0] == 7).all()
    preview, final = make_windows(Data("generated"), llama(bos_token_id=None), None, task="causal")
    assert len(set(torch.cat([preview.input_ids, final.input_ids])[:, 0].tolist())) > 1


class Chain(nn.Module):
    """A causal model whose next token depends on the last one only, by known probabilities; it has no cache."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(probabilities).log())
        self.config = type("Config", (), {"vocab_size": len(probabilities), "bos_token_id": 0})()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.table(input_ids)})()


def test_tokens_are_drawn_from_the_models_own_distribution() -> None:
    chain = [[0.0, 0.7, 0.3], [0.5, 0.25, 0.25], [0.9, 0.0, 0.1]]
    text = write_text(Chain(chain), WindowLayout(64), 400, seed=0).numpy()
    pairs = Counter(zip(text[:, :-1].ravel().tolist(), text[:, 1:].ravel().tolist(), strict=True))
    counts = np.array([[pairs[a, b] for b in range(3)] for a in range(3)])
    share = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(share - np.array(chain)).max() < 0.02
    assert counts[0, 0] == counts[2, 1] == 0


def test_a_cache_changes_nothing_but_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    torch.nn.init.normal_(model.lm_head.weight)
    cached = write_text(model, WindowLayout(32), 4, seed=3)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: forward(input_ids, attention_mask))
    assert torch.equal(write_text(model, WindowLayout(32), 4, seed=3), cached)


def test_a_masked_model_never_writes_special_tokens(bert_tokenizer: Any) -> None:
    layout = WindowLayout.of(bert(), bert_tokenizer, task="masked", length=24)
    text = write_text(bert(), layout, 50, seed=0)
    assert text.shape == (50, 22)
    assert not torch.isin(text, torch.tensor(bert_tokenizer.all_special_ids)).any()


def test_a_broken_model_writes_something_that_can_be_measured() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    preview, _ = make_windows(Data("generated"), model, None, task="causal")
    assert int(preview.input_ids.min()) >= 0 and int(preview.input_ids.max()) < VOCABULARY
