"""Samples that are more than a text: images, sounds and pairs, from files to what a model reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import DEMO, Done, read_report, texts_of
from media import CAPTIONS, SOUNDS, draw, lines, play
from tiny_models import MODELS
from transformers import AutoTokenizer

from invarlock.api import UNSCORED, changed_order
from invarlock.config.schema import DatasetConfig
from invarlock.pipeline.reference.tree import tree_of_windows, windows_of
from plugins_builtin.tasks import sounds
from plugins_builtin.tasks.classification import SequenceClassification
from plugins_builtin.tasks.embedding import Embedding
from plugins_builtin.tasks.image_text import ImageText
from plugins_builtin.tasks.speech import Speech
from plugins_builtin.tasks.transcripts import word_errors
from plugins_builtin.tasks.vision_language import VisionLanguage

IMAGES = {
    "LlavaForConditionalGeneration": {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
    "CLIPModel": {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
    "Qwen2VLForConditionalGeneration": {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "min_pixels": 64,
    },
}  # fmt: skip


def dataset(provider: str, path: object, **settings: Any) -> DatasetConfig:
    return DatasetConfig(**{"seq_len": 32, "preview_n": 1, "final_n": 2} | settings, provider=provider, path=str(path))


def saved(name: str, processor: Mapping[str, object]) -> Any:
    """A tiny model as it is loaded, with the files of its processor."""
    model = MODELS[name]()
    folder = tiny_models.save(model, Path(name))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model.config._name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "checkpoint")


@pytest.fixture
def compared(invarlock: Callable[..., Done]) -> Callable[..., Done]:
    """Compare a tiny model with itself on data of a provider."""

    def call(name: str, provider: str, path: object, *arguments: object) -> Done:
        folder = tiny_models.save(MODELS[name](), Path(name))
        settings = {"dataset.provider": provider, "dataset.path": path, "dataset.preview_n": 1, "dataset.final_n": 2}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return invarlock("compare", "--baseline", folder, "--subject", folder, "--out", "out", *words, *arguments)

    return call


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_classifier_of_images_is_measured_on_those_of_a_folder(compared, invarlock) -> None:
    done = compared("ViTForImageClassification", "local_images", draw(Path("images"), 9), "--strict")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    # As many of a window as there are for all windows alike.
    assert report["metrics"]["primary"]["tokens"] == 6
    assert "real inputs" not in [gap["part"] for gap in report["coverage"]["gaps"]]
    Path("images").rename("moved")
    folders = (
        "--baseline",
        "ViTForImageClassification",
        "--subject",
        "ViTForImageClassification",
        "--dataset",
        "moved",
    )
    verified = invarlock("verify", "out", *folders)
    assert verified.code == 0, verified.out + verified.err
    assert "of the edited model, measured again" in verified.out


def test_an_image_that_does_not_open_is_named(compared) -> None:
    draw(Path("images"), 2)
    Path("images/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    done = compared("ViTForImageClassification", "local_images", "images", "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "dataset.path: images/torn.jpg does not open as an image" in done.err


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_every_other_text_follows_its_own_image(name: str, tokenizer: Any) -> None:
    model = saved(name, IMAGES[name])
    draw(Path("images"))
    for number, caption in enumerate(CAPTIONS):
        Path(f"images/{number}.txt").write_text(caption)
    data, task = dataset("local_images", "images"), VisionLanguage()
    _, final = task.make_windows(model, data, tokenizer, texts_of(data))
    scored = [row[row != UNSCORED].tolist() for row in final.labels]
    assert scored[0] != scored[1]
    assert all(tokenizer.decode(row) in CAPTIONS for row in scored)
    image = int((final.input_ids[0] == 5).sum()) + (2 if "Qwen" in name else 0)
    assert final.attention_mask.sum(dim=1).tolist() == [image + len(scored[0]), len(scored[1])]
    assert final.illustrated is not None and final.illustrated.tolist() == [True, False]
    assert (task.made_up_media, task.towers) == ("", {"vision"})
    assert windows_of(tree_of_windows(final)).equal(final)
    both = task.measure(model, final[:1], final)
    assert both.losses == pytest.approx(task.measure(model, final[:1], final, at_once=1).losses, rel=1e-5)
    text = torch.tensor([scored[1]])
    with torch.no_grad():
        alone = model(input_ids=text, labels=text).loss * (len(scored[1]) - 1)
    assert both.losses[1] == pytest.approx(float(alone), rel=1e-5)


def test_images_and_texts_that_belong_together_are_one_sample(tokenizer: Any) -> None:
    model, folder = saved("CLIPModel", IMAGES["CLIPModel"]), draw(Path("images"))
    path = lines(
        Path("pairs.jsonl"),
        *({"image": f"{folder}/{number}.png", "text": text} for number, text in enumerate(CAPTIONS)),
    )
    task = ImageText()
    for provider, made_up in (("pairs", ""), ("local_images", "random tokens")):
        data = dataset(provider, path if provider == "pairs" else folder)
        _, final = task.make_windows(model, data, tokenizer, texts_of(data))
        assert final.media["pixel_values"].shape == (2, 3, 32, 32)
        assert task.made_up_media == made_up
        if not made_up:
            shown = [
                tokenizer.decode(row[:size])
                for row, size in zip(final.input_ids, final.attention_mask.sum(1), strict=True)
            ]
            assert all(any(caption in text for caption in CAPTIONS) for text in shown)


# -- sounds ------------------------------------------------------------------------------------------------------------


def test_a_sound_of_another_rate_is_resampled_and_that_is_logged(caplog) -> None:
    model = saved("WhisperForConditionalGeneration", SOUNDS)
    files = [play(Path("own.wav")), play(Path("other.wav"), rate=44_100)]
    own, other = sounds.given_sounds(model, files)
    assert own.shape == (16, 100)
    assert float((own - other).abs().mean()) < 0.01
    assert "1 of 2 sounds were resampled to 16000 Hz (as other.wav)" in caplog.text


def test_samples_of_each_width_are_the_same_sound() -> None:
    model = saved("WhisperForConditionalGeneration", SOUNDS)
    files = [play(Path(f"{width}.wav"), width=width) for width in (1, 2, 3, 4)]
    narrow, *wide = sounds.given_sounds(model, files)
    assert all(torch.allclose(each, wide[-1], atol=0.02) for each in wide)
    # The noise of eight bits.
    assert float((narrow - wide[-1]).abs().mean()) < 0.5


def test_the_target_of_a_sound_is_its_text(tokenizer: Any) -> None:
    model = saved("WhisperForConditionalGeneration", SOUNDS)
    Path("sounds").mkdir()
    for number, caption in enumerate(CAPTIONS):
        play(Path(f"sounds/{number}.wav"))
        Path(f"sounds/{number}.txt").write_text(caption)
    data, task = dataset("local_audio", "sounds"), Speech()
    _, final = task.make_windows(model, data, tokenizer, texts_of(data))
    assert all(tokenizer.decode(row[row != UNSCORED]) in CAPTIONS for row in final.labels)
    assert task.made_up_media == ""
    first = task.measure(model, final[:1], final)
    assert first.tokens.tolist() == (final.labels != UNSCORED).sum(dim=1).tolist()
    assert first.transcripts is not None and len(first.transcripts) == 2


def test_pairs_of_texts_have_text_for_a_task_that_reads_no_second_one(tokenizer: Any) -> None:
    model = saved("WhisperForConditionalGeneration", SOUNDS)
    pairs = [{"text": caption * 9, "text_pair": caption} for caption in CAPTIONS]
    data, task = dataset("pairs", lines(Path("pairs.jsonl"), *pairs)), Speech()
    _, final = task.make_windows(model, data, tokenizer, texts_of(data))
    assert (final.labels != UNSCORED).all()
    assert task.made_up_media == "random sounds"


def test_what_is_no_sound_is_named_with_the_library_that_might_read_it(compared, monkeypatch) -> None:
    Path("sounds").mkdir()
    for number in range(3):
        Path(f"sounds/{number}.flac").write_bytes(b"fLaC")
    monkeypatch.setattr(sounds, "find_spec", lambda name: None)
    done = compared("WhisperForConditionalGeneration", "local_audio", "sounds", "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert re.search(r"sounds/\d.flac does not open as a sound: .*pip install 'invarlock\[audio\]'", done.err)


def test_words_that_differ_are_counted_against_the_baseline(tokenizer: Any) -> None:
    texts = ["the earth was without form", "the earth is form"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows)) + 1
    before, after = (np.array([[*row, *[0] * (width - len(row))]]) for row in rows)
    figure = word_errors(before, after, tokenizer)
    # One word replaced and one left out, of five.
    assert (figure.name.split()[0], figure.value, figure.action) == ("word", 0.4, "warn")
    assert word_errors(before, before, None).value == 0


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_a_reranker_reads_pairs_as_its_tokenizer_joins_them(tokenizer: Any) -> None:
    state = tokenizer.backend_tokenizer.to_str()
    model = tiny_models.built("BertForSequenceClassification", **tiny_models.SIZE, num_labels=1)
    pairs = [{"text": CAPTIONS[0], "text_pair": CAPTIONS[1]}] * 3
    data, task = dataset("pairs", lines(Path("pairs.jsonl"), *pairs)), SequenceClassification()
    _, final = task.make_windows(model, data, tokenizer, texts_of(data))
    assert final.input_ids[0, : final.attention_mask[0].sum()].tolist() == tokenizer(*CAPTIONS[:2])["input_ids"]
    assert tokenizer.backend_tokenizer.to_str() == state
    without = task.make_windows(model, dataset("generated", None), None, None)[1]
    # A quarter of the tokens is the query.
    types, seen = without.media["token_type_ids"], without.attention_mask.bool()
    assert (types[0][seen[0]] == 0).sum() * 4 == seen[0].sum()
    scores = task.measure(model, without[:1], without)
    assert scores.vectors["labels"].shape == (len(without), 1)


def test_the_order_of_scores_is_held_against_a_limit() -> None:
    before, after = (np.array(scores, dtype=np.float32)[:, None] for scores in ([1, 2, 3, 4], [1, 3, 2, 4]))
    assert changed_order(before, after) == pytest.approx(1 / 6)
    assert changed_order(before, before) == 0
    assert changed_order(before, after * math.nan) is None


def test_an_embedding_tells_how_the_cosines_of_pairs_are_ordered(tokenizer: Any) -> None:
    model = MODELS["BertModel"]()
    pairs = [{"text": one, "text_pair": other} for one in CAPTIONS for other in CAPTIONS]
    data, task = dataset("pairs", lines(Path("pairs.jsonl"), *pairs), final_n=8), Embedding()
    preview, final = task.make_windows(model, data, tokenizer, texts_of(data))
    measured = task.measure(model, preview, final)
    assert len(measured.vectors["text"]) == 2 * 8
    figures = {figure.name: figure.value for figure in task.figures(measured.vectors, measured.vectors, None)}
    assert figures["order of pairs that changed"] == 0


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "record", "message"),
    [
        ("pairs", {"text": "alone"}, "a pair is two of text, text_pair, image, audio; there is text"),
        ("pairs", {"text": "a", "text_pair": 5}, "text_pair holds a int, not text"),
        ("local_images", {"image": "gone.png", "text": "a"}, "gone.png does not exist"),
        ("local_audio", {"text": "a"}, "no 'audio'; provider local_audio reads its path"),
    ],
)
def test_a_broken_record_is_one_line(compared, provider: str, record: dict[str, object], message: str) -> None:
    done = compared("BertModel", provider, lines(Path("records.jsonl"), record), "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err


@pytest.mark.parametrize("name", ["ViTForImageClassification", "LlamaForCausalLM"])
def test_data_without_the_columns_of_a_task_are_refused_before_its_weights_are_read(
    compared, name: str, monkeypatch
) -> None:
    monkeypatch.setattr("invarlock.checkpoints.reader.Checkpoint.__init__", lambda *_: pytest.fail("weights were read"))
    given = ("local_images", draw(Path("images"))) if "Llama" in name else ("demo", "null")
    done = compared(name, *given, "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    wanted = "have image, and causal models read text" if "Llama" in name else "have text, and image classification"
    assert wanted in done.err


def test_too_few_samples_are_counted(compared) -> None:
    done = compared("ViTForImageClassification", "local_images", draw(Path("images"), 2), "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "there are 2 samples, and 3 windows are asked for" in done.err
