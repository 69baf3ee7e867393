"""Windows of text that a chat template renders as conversations."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.config.schema import DatasetConfig
from invarlock.datasets.conversations import ChatTemplate
from invarlock.datasets.layout import WindowLayout, encode
from invarlock.datasets.same_text import Side, read_same_text
from invarlock.datasets.windows import conversation_places, make_windows
from invarlock.evaluation.passes import measure
from invarlock.evaluation.per_byte import over_same_text
from invarlock.reporting.report import json_schema
from invarlock.testing import architectures

TEXTS = [json.loads(line)["text"] for line in (DEMO / "text.jsonl").read_text().splitlines()]
TEXT = ("--dataset", DEMO / "text.jsonl")
SMALL = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=6", "--set", "dataset.preview_n=2")
INVARIANTS = ("--set", "guards.order=[invariants]")
DATA = DatasetConfig(provider="demo", seq_len=64, preview_n=5, final_n=6)
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
)
ONE_TURN = (
    "{% if messages | length > 1 or messages[0].role != 'user' %}{{ raise_exception('one question') }}{% endif %}"
    "<|im_start|>{{ messages[0].content }}<|im_end|>"
)
SILENT_ON_SYSTEM = CHATML.replace("in messages %}", "in messages if message.role != 'system' %}")
DATED = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + CHATML
REFUSING = {
    "raises": ("{{ raise_exception('not today') }}", "TemplateError: not today"),
    "is no template": ("{% for %}", "TemplateSyntaxError"),
    "leaves the text out": ("<|im_start|>", "it leaves turns out"),
}


def chatting(template: str | None = CHATML) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def llama() -> Any:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32")
    torch.manual_seed(0)
    model.resize_token_embeddings(1026, mean_resizing=False)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request, llama, tmp_path_factory) -> Path:
    """A model that chats."""
    model = llama if request.param == "llama" else architectures.gpt2(vocab_size=1026)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    chatting().save_pretrained(folder)
    return folder


@pytest.fixture
def compare(invarlock) -> Callable[..., dict[str, Any]]:
    def run(baseline: Path, subject: Path, *options: object) -> dict[str, Any]:
        arguments = (*SMALL, *INVARIANTS, *options, "--out", "out", "--force")
        done = invarlock("compare", "--baseline", baseline, "--subject", subject, *arguments)
        assert done.code in (0, 1), done.out + done.err
        report = read_report(Path("out"))
        jsonschema.validate(report, json_schema())
        return report

    return run


def special_tokens(report: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in report["coverage"]["tokens"] if entry["kind"] == "special")


def gaps(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {gap["part"]: gap for gap in report["coverage"]["gaps"]}


def windows_of(model: Any, tokenizer: Any, chat: ChatTemplate | None) -> torch.Tensor:
    windows = make_windows(DATA, model, tokenizer, task="causal", documents=TEXTS, chat=chat)
    return torch.cat([part.input_ids for part in windows])


# -- windows -----------------------------------------------------------------------------------------------------------


def test_one_window_in_four_is_a_conversation_of_its_own_text(llama) -> None:
    tokenizer = chatting()
    plain, mixed = (windows_of(llama, tokenizer, chat) for chat in (None, ChatTemplate.of(tokenizer)))
    rendered = [place for place in range(len(plain)) if not torch.equal(plain[place], mixed[place])]
    assert rendered == conversation_places(DATA) == [0, 4, 5, 9]
    for place in rendered:
        text, conversation = tokenizer.decode(plain[place]), tokenizer.decode(mixed[place])
        assert conversation.startswith("<|im_start|>system\n")
        words = conversation.split("user\n")[1].split(END)[0].split()
        assert words and set(words[1:-1]) <= set(text.split())
        assert conversation.count(START) >= 3


def test_the_same_conversations_each_time_whatever_the_day(llama) -> None:
    tokenizer = chatting(DATED)
    template = ChatTemplate.of(tokenizer)
    assert torch.equal(windows_of(llama, tokenizer, template), windows_of(llama, tokenizer, ChatTemplate.of(tokenizer)))
    assert "2024-07-26" in template.sample


@pytest.mark.parametrize(
    ("template", "turns"), [(CHATML, 5), (ALTERNATING, 4), (SILENT_ON_SYSTEM, 4), (ONE_TURN, 1), (DATED, 5)]
)
def test_a_template_gets_the_fullest_form_that_it_renders(llama, template, turns) -> None:
    tokenizer = chatting(template)
    chat = ChatTemplate.of(tokenizer)
    assert len(chat.roles) == turns
    mixed = windows_of(llama, tokenizer, chat)
    assert (mixed[conversation_places(DATA)] == tokenizer.convert_tokens_to_ids(START)).any(dim=1).all()


def test_long_windows_hold_several_conversations() -> None:
    tokenizer = chatting()
    tokens = encode(tokenizer, " ".join(TEXTS))[:2000]
    text = ChatTemplate.of(tokenizer).conversation(tokens, 2000)
    turns = [turn.partition("\n")[2] for turn in text.split(START)[1:]]
    assert text.count("system\n") > 1
    assert 200 < max(map(len, turns)) < 600


def test_a_short_conversation_begins_again(llama) -> None:
    tokenizer = chatting()
    text = ChatTemplate.of(tokenizer).conversation(encode(tokenizer, "In the beginning"), 200)
    assert len(encode(tokenizer, text)) >= 200
    assert text.count("system\n") > 1


@pytest.mark.parametrize("tokens", [[0] * 20, []], ids=["special tokens alone", "nothing"])
def test_text_without_words_still_has_turns(tokens) -> None:
    assert "user\n...<|im_end|>" in ChatTemplate.of(chatting(CHATML)).conversation(tokens, 20)


def test_a_token_that_the_tokenizer_puts_first_is_not_doubled(llama) -> None:
    tokenizer = chatting("<|endoftext|>" + CHATML)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    start = tokenizer.convert_tokens_to_ids(START)
    for row in windows_of(llama, tokenizer, ChatTemplate.of(tokenizer))[conversation_places(DATA)].tolist():
        assert row[:2] == [0, start]


def test_both_sides_read_the_baselines_conversations(llama) -> None:
    ours, theirs = chatting(), chatting("another template {{ messages }}")
    # Knows no chat tokens: it splits their text.
    plain = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    model = llama
    for other in (theirs, plain):
        sides = [Side(each, WindowLayout.of(model, each, task="causal", length=64)) for each in (ours, other)]
        same = read_same_text(DATA, TEXTS, *sides, most=None, chat=ChatTemplate.of(ours))
        final = make_windows(DATA, model, ours, task="causal", documents=TEXTS, chat=ChatTemplate.of(ours))[1]
        before, after = (measure(model, part[:0], part, task="causal") for part in (final, same.windows))
        sizes = over_same_text(before, after, same.shared)
        assert (sizes[0].bytes > 60).all()
        texts = [
            side.decode(ids[0][torch.from_numpy(places)])
            for side, ids, places in (
                (ours, final.input_ids, same.shared[0].baseline),
                (other, same.windows.input_ids, same.shared[0].subject),
            )
        ]
        assert texts[0] == texts[1] and START in texts[0]


# -- comparisons and runs ----------------------------------------------------------------------------------------------


def test_more_special_tokens_are_seen(compare, checkpoint) -> None:
    plain = compare(checkpoint, checkpoint, *TEXT, "--set", "dataset.chat=never")
    assert plain["coverage"]["conversations"] == 0
    gap = gaps(plain)["special tokens"]
    assert f"{START}, {END}" in gap["message"]
    option = gap["remedy"].removeprefix("--set ").removesuffix(" exercises 2 of them")
    assert option == "dataset.chat=auto"
    chatty = compare(checkpoint, checkpoint, *TEXT, "--set", option)
    assert chatty["coverage"]["conversations"] == 3
    assert special_tokens(chatty)["seen"] >= special_tokens(plain)["seen"] + 2
    assert "special tokens" not in gaps(chatty) or START not in gaps(chatty)["special tokens"]["message"]


def test_windows_too_short_for_a_turn_name_their_length(compare, checkpoint) -> None:
    report = compare(checkpoint, checkpoint, *TEXT, "--set", "dataset.seq_len=8")
    assert END in gaps(report)["special tokens"]["message"]
    assert gaps(report)["special tokens"]["remedy"] == "--set dataset.seq_len=16 exercises 1 of them"


def test_without_text_there_are_no_conversations(compare, checkpoint) -> None:
    report = compare(checkpoint, checkpoint, "--generated")
    assert report["coverage"]["conversations"] == 0
    assert "chat template" in gaps(report)["special tokens"]["remedy"]


@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_every_rendering_counts_conversations(compare, invarlock, checkpoint, form) -> None:
    compare(checkpoint, checkpoint, *TEXT)
    assert "3 conversations" in invarlock("report", "out", "--format", form).out


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_renders_nothing_is_a_gap(compare, checkpoint, name) -> None:
    template, reason = REFUSING[name]
    folder = Path(shutil.copytree(checkpoint, "refusing"))
    (folder / "chat_template.jinja").write_text(template)
    report = compare(folder, folder, *TEXT)
    assert report["coverage"]["conversations"] == 0
    assert reason in gaps(report)["chat template"]["message"]
    assert report["verdict"]["action"] == "continue"


def test_a_row_of_a_chat_token_is_measured(compare, checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    end = chatting().convert_tokens_to_ids(END)
    with torch.no_grad():
        model.get_input_embeddings().weight[end] *= -6
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight[end] *= -6
    subject = Path(shutil.copytree(checkpoint, "subject"))
    model.save_pretrained(subject)
    losses = {}
    for chat in ("auto", "never"):
        found = compare(checkpoint, subject, *TEXT, "--set", f"dataset.chat={chat}")["metrics"]
        losses[chat] = np.abs(np.subtract(found["windows"]["edited"], found["windows"]["baseline"]))
    assert (losses["auto"][[0, 4]] > 2 * losses["never"].max()).all()
    # The first and the fifth one; the text in the others is the same.
    assert losses["auto"][[1, 2, 3, 5]] == pytest.approx(losses["never"][[1, 2, 3, 5]])


def test_another_template_is_no_other_text(compare, checkpoint) -> None:
    subject = Path(shutil.copytree(checkpoint, "subject"))
    (subject / "chat_template.jinja").write_text(ALTERNATING)
    report = compare(checkpoint, subject, *TEXT)
    assert (report["metrics"]["primary"]["unit"], report["metrics"]["primary"]["ratio"]) == ("token", 1.0)


def test_chat_tokens_with_other_ids_are_compared_per_byte(compare, invarlock, checkpoint) -> None:
    subject = Path(shutil.copytree(checkpoint, "subject"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    tokenizer.add_special_tokens({"additional_special_tokens": [END, START]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(subject)
    report = compare(checkpoint, subject, *TEXT)
    windows = report["metrics"]["windows"]
    assert report["metrics"]["primary"]["unit"] == "byte"
    apart = np.abs(np.subtract(windows["edited"], windows["baseline"]))
    assert apart[[0, 4]].max() > 0.1
    assert apart[[1, 2, 3, 5]] == pytest.approx(0, abs=1e-3)
    again = invarlock("verify", "out", "--baseline", checkpoint, "--subject", subject)
    assert again.code == 0, again.out


@pytest.mark.parametrize(
    "options", [(), ("--stream", "--set", "output.format=dequantized")], ids=["memory", "streamed"]
)
def test_a_run_has_conversations_too(invarlock, config, checkpoint, options) -> None:
    dataset = {"provider": "local_jsonl", "path": str(DEMO / "text.jsonl"), "seq_len": 64, "preview_n": 2, "final_n": 6}
    file = config(model={"id": str(checkpoint), "dtype": "float32"}, dataset=dataset)
    done = invarlock("run", "-c", file, *options, "--out", "out")
    assert done.code == 0, done.out + done.err
    assert read_report(Path("out"))["coverage"]["conversations"] == 3
    assert invarlock("verify", "out", "--baseline", checkpoint).code == 0


def test_measured_again_a_report_has_the_same_conversations(compare, invarlock, checkpoint) -> None:
    compare(checkpoint, checkpoint, *TEXT)
    assert invarlock("verify", "out", "--baseline", checkpoint, "--subject", checkpoint).code == 0
    alone = invarlock("verify", "out", "--subject", checkpoint)
    assert (alone.code, "the baseline's chat template renders" in alone.out) == (0, True), alone.out
    # An older version rendered none.
    from invarlock.pipeline.report_builder import config_digest

    report = compare(checkpoint, checkpoint, *TEXT, "--set", "dataset.chat=never")
    aged = copy.deepcopy(report)
    del aged["config"]["dataset"]["chat"], aged["coverage"]["conversations"]
    aged["config_sha256"] = config_digest(aged["config"])
    Path("out/report.json").write_text(json.dumps(aged))
    done = invarlock("verify", "out", "--baseline", checkpoint, "--subject", checkpoint)
    assert done.code == 0, done.out
