"""Tasks: what is measured of each kind of models, on a tiny model of a real class."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import DEMO, Done, read_report, slow
from tiny_models import MODELS

from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization import Plan, quantize_model

SMALL = {"dataset.seq_len": 64, "dataset.preview_n": 2, "dataset.final_n": 24, "model.device": "cpu"}
TASK_OF = {
    "LlamaForCausalLM": ("perplexity", "ratio"),
    "BertForMaskedLM": ("masked_perplexity", "ratio"),
    "T5ForConditionalGeneration": ("target_perplexity", "ratio"),
    "BertModel": ("cosine_distance", "mean"),
    "BertForSequenceClassification": ("label_disagreement", "share"),
    "BertForTokenClassification": ("label_disagreement", "mean"),
    "LlamaForSequenceClassification": ("label_disagreement", "share"),
    "ViTForImageClassification": ("label_disagreement", "share"),
    "ResNetForImageClassification": ("label_disagreement", "share"),
    "SwinForImageClassification": ("label_disagreement", "share"),
    "CLIPModel": ("cosine_distance", "mean"),
    "WhisperForConditionalGeneration": ("target_perplexity", "ratio"),
    "LlavaForConditionalGeneration": ("perplexity", "ratio"),
    "Qwen2VLForConditionalGeneration": ("perplexity", "ratio"),
    "LlavaNextForConditionalGeneration": ("perplexity", "ratio"),
    "Idefics3ForConditionalGeneration": ("perplexity", "ratio"),
    "InternVLForConditionalGeneration": ("perplexity", "ratio"),
    "Mistral3ForConditionalGeneration": ("perplexity", "ratio"),
    "MllamaForConditionalGeneration": ("perplexity", "ratio"),
    "Qwen2AudioForConditionalGeneration": ("perplexity", "ratio"),
    "BloomForCausalLM": ("perplexity", "ratio"),
    "Lfm2ForCausalLM": ("perplexity", "ratio"),
    "RecurrentGemmaForCausalLM": ("perplexity", "ratio"),
    "MambaForCausalLM": ("perplexity", "ratio"),
    "JambaForCausalLM": ("perplexity", "ratio"),
}
MINE = """
from invarlock import hookimpl
from invarlock.api import Metric, VectorTask

class Mine(VectorTask):
    name, metric = "mine", Metric("mine", "mean", limit=0.5)

    def owns(self, model_class):
        return "BertModel" in model_class.names

    def vectors(self, model, batch):
        output = model(**batch).pooler_output
        return {"text": output}

@hookimpl
def invarlock_tasks():
    return [Mine()]
"""
ROOT = Path(__file__).parent.parent
TEXT = ("--dataset", DEMO / "text.jsonl")


@pytest.fixture
def judged(invarlock: Callable[..., Done]) -> Callable[..., Done]:
    """Compare a model with itself after an edit; the report goes to ``out``."""

    def call(model: Any, edit: Callable[[Any], object], *arguments: object) -> Done:
        tiny_models.save(model, Path("baseline"))
        with torch.no_grad():
            edit(model)
        tiny_models.save(model, Path("subject"))
        settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
        return invarlock(
            "compare", "--baseline", "baseline", "--subject", "subject", "--out", "out", *settings, *arguments
        )

    return call


def rounded(bits: int, **plan: Any) -> Callable[[Any], object]:
    return lambda model: quantize_model(model, Plan(bitwidth=bits, scope="all", **plan))


SECOND = (
    "JambaForCausalLM",
    "LlamaForSequenceClassification",
    "LlavaForConditionalGeneration",
    "ResNetForImageClassification",
)
"""Classes of tasks that another class is tested with."""
THIRD = (
    "LlavaNextForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "SwinForImageClassification",
    "BloomForCausalLM",
    "Lfm2ForCausalLM",
    "RecurrentGemmaForCausalLM",
)
"""Classes of which the suite tests what is of their own alone."""


def text_of(name: str) -> tuple[Any, ...]:
    """Text for those models that read any."""
    return () if name.endswith("ForImageClassification") else TEXT


FIRST = [name for name in MODELS if name not in (*SECOND, *THIRD)]
LATER = (*SECOND, *THIRD)
READERS = [(name, True) for name in FIRST if text_of(name)], [(name, True) for name in LATER if text_of(name)]


@pytest.mark.parametrize(
    ("name", "reads"),
    [*READERS[0], *((name, False) for name in FIRST), *slow(*READERS[1], *((name, False) for name in LATER))],
)
def test_the_unedited_model_is_accepted_without_a_warning(name: str, reads: bool, judged) -> None:
    done = judged(MODELS[name](), lambda model: None, *(TEXT if reads else ()), "--strict")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    metric = report["metrics"]["primary"]
    assert (metric["kind"], metric["statistic"]) == TASK_OF[name]
    assert metric["ratio"] == (1.0 if metric["statistic"] == "ratio" else None)
    assert report["verdict"]["action"] == "continue"
    assert report["coverage"]["images"] == (13 if name.startswith(("Llava", "Qwen2VL")) else 0)


@pytest.mark.parametrize("name", [*FIRST, *slow(*LATER)])
def test_eight_bits_per_channel_are_accepted(name: str, judged) -> None:
    done = judged(MODELS[name](), rounded(8), *text_of(name))
    assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("name", [*FIRST, *SECOND, *slow(*THIRD)])
def test_two_bits_per_tensor_are_rejected(name: str, judged) -> None:
    done = judged(MODELS[name](), rounded(2, per_channel=False), *text_of(name))
    assert done.code == 1, done.out + done.err
    # Of an untrained model, text is as unlikely before as after: the predictions tell.
    metrics = read_report(Path("out"))["metrics"]
    outputs = [metrics["primary"], metrics["predictions"], *metrics["figures"]]
    assert "rollback" in [each["action"] for each in outputs if each]


def test_an_embedding_model_may_be_stored_without_a_pooler(judged) -> None:
    import transformers

    config = transformers.BertConfig(**tiny_models.SIZE)
    done = judged(transformers.BertModel(config, add_pooling_layer=False).eval(), lambda model: None, *TEXT, "--strict")
    assert done.code == 0, done.out + done.err


def test_a_run_rounds_an_embedding(invarlock, config) -> None:
    tiny_models.save(MODELS["BertModel"](), Path("baseline"))
    dataset = {"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 4}
    edit = {"plan": {"bitwidth": 8, "scope": "all"}}
    done = invarlock("run", "-c", config(model={"id": "baseline"}, dataset=dataset, edit=edit), "--out", "out")
    assert done.code == 0, done.err
    assert read_report(Path("out"))["attempts"][0]["figure"] > 0


@pytest.mark.parametrize(
    ("stated", "same"),
    [({"pooling_mode_mean_tokens": True}, True), ({"pooling_mode": "cls"}, False)],
    ids=["mean", "cls"],
)
def test_the_pooling_of_a_folder_is_read(judged, stated: dict[str, Any], same: bool) -> None:
    """The vectors of a subject whose files state another pooling are others."""
    model = MODELS["BertModel"]()

    def pool(_: Any) -> None:
        modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
        Path("subject/1_Pooling").mkdir(parents=True)
        Path("subject/modules.json").write_text(json.dumps(modules))
        Path("subject/1_Pooling/config.json").write_text(json.dumps(stated))

    assert judged(model, pool, *TEXT).code == (0 if same else 1)


def sentence_modules(folder: Path, *, activation: str = "Tanh") -> torch.Tensor:
    """Files of sentence-transformers: the mean, a dense layer and unit length; the weight of the layer."""
    from safetensors.torch import save_file

    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, config in (
        ("1_Pooling", {"pooling_mode": "mean"}),
        ("2_Dense", {"activation_function": f"x.{activation}"}),
    ):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    return weight


@pytest.fixture
def hub(monkeypatch) -> Path:
    """The cache of a hub with a snapshot of some/model, yet empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").absolute()))
    repository = Path("hub/models--some--model")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1")
    return repository / "snapshots" / "1"


@pytest.mark.parametrize("cached", [False, True], ids=["folder", "hub"])
def test_the_modules_after_the_pooling_make_the_vector(cached: bool, hub: Path) -> None:
    from plugins_builtin.tasks.embedding import Embedding

    model = MODELS["BertModel"]()
    folder = tiny_models.save(model, hub if cached else Path("baseline"))
    weight = sentence_modules(folder)
    model.config._name_or_path = "some/model" if cached else str(folder)
    batch = {"input_ids": torch.arange(4)[None], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        pooled = model(**batch).last_hidden_state.mean(dim=1)
        found = Embedding().vectors(model, batch)["text"]
    wanted = torch.nn.functional.normalize(torch.tanh(pooled @ weight.T))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_saved_embedding_keeps_the_modules_that_make_its_vectors(invarlock, config) -> None:
    sentence_modules(tiny_models.save(MODELS["BertModel"](), Path("baseline")))
    dataset = {"provider": "demo", "seq_len": 32, "preview_n": 1, "final_n": 4}
    path = config(model={"id": "baseline"}, dataset=dataset, output={"save_model": True})
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 0, done.out + done.err
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert Path("out/model", name).read_bytes() == Path("baseline", name).read_bytes()
    assert invarlock("verify", "out").code == 0


def test_a_dense_layer_that_cannot_be_applied_is_refused(judged) -> None:
    def modules(_: Any) -> None:
        sentence_modules(Path("baseline"), activation="Magic")

    done = judged(MODELS["BertModel"](), modules, "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "activation 'Magic' is none of Identity, Tanh," in done.err


def test_an_unknown_pooling_is_refused(judged) -> None:
    def pool(_: Any) -> None:
        Path("baseline/modules.json").write_text('[{"type": "x.Pooling", "path": ""}]')
        config = json.loads(Path("baseline/config.json").read_text())
        Path("baseline/config.json").write_text(json.dumps(config | {"pooling_mode": "magic"}))

    done = judged(MODELS["BertModel"](), pool, "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "pooling 'magic' is none of mean, cls," in done.err


PROBED = (
    "WhisperForConditionalGeneration",
    "ViTForImageClassification",
    "ResNetForImageClassification",
    "BertForSequenceClassification",
    "LlamaForSequenceClassification",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)
"""Classes whose weights alone are judged, as those of a neighbour are."""


@pytest.mark.parametrize("name", ["BertModel", "CLIPModel", *slow(*PROBED)])
def test_weights_alone_judge_a_model_of_any_kind(name: str, judged) -> None:
    assert judged(MODELS[name](), rounded(8), "--weights-only").code == 0
    done = judged(MODELS[name](), rounded(2, per_channel=False), "--weights-only", "--force")
    assert done.code == 1, done.out + done.err
    report = read_report(Path("out"))
    assert report["verdict"]["decided_by"] == "guard reconstruction"
    guard = next(guard for guard in report["guards"] if guard["name"] == "reconstruction")
    assert not guard["metrics"]["not_measured"]


def test_outputs_that_were_measured_decide_over_the_errors_of_parts(judged) -> None:
    """Whatever the metric is of: 4 bits change few of the labels, and the parts by far more than their limit."""
    limits = ("--set", "eval.metric.limit=0.9", "--set", "eval.max_pm_ratio=1e6")
    strict = ("--set", "guards.reconstruction.max_score=1e-6", "--set", "guards.order=[reconstruction]")
    done = judged(MODELS["BertForSequenceClassification"](), rounded(4), *TEXT, *limits, *strict)
    assert done.code == 0, done.out + done.err
    assert read_report(Path("out"))["guards"][0]["metrics"]["score"] > 1e-6


def test_edited_weights_that_no_window_reaches_warn(judged, monkeypatch) -> None:
    """Of a vision-language model whose images cannot be made, text alone is measured."""
    from plugins_builtin.tasks import vision_language

    def cannot(*_: object) -> None:
        raise ValueError("another processor")

    monkeypatch.setattr(vision_language._Images, "of", cannot)
    name = "Qwen2VLForConditionalGeneration"
    assert judged(MODELS[name](), lambda model: None, *TEXT, "--strict").code == 0
    coverage = [gap["part"] for gap in read_report(Path("out"))["coverage"]["gaps"]]
    assert "vision tower" in coverage and "real inputs" not in coverage
    done = judged(MODELS[name](), rounded(8), *TEXT, "--force")
    assert done.code == 0, done.err
    report = read_report(Path("out"))
    assert report["verdict"]["decided_by"] == "coverage"
    gap = next(gap for gap in report["coverage"]["gaps"] if gap["part"] == "weights that never ran")
    assert re.search(r"[1-9]\d* of \d+ edited weights, which no window reaches \(as model\.visual\.", gap["message"])


def test_the_page_of_models_lists_the_classes_that_are_tested() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "models.md").read_text().splitlines() if line.count("|") == 6]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[2])} == {*MODELS}
    tasks = PluginManager.load(Selection(autoload=False)).tasks()
    assert {row[1].strip() for row in rows} - {"task", "---"} == {*tasks}


@pytest.mark.parametrize("named", ["folder", "adapter", "hub"])
def test_what_no_task_owns_is_refused_before_its_weights_are_read(named: str, invarlock, hub, monkeypatch) -> None:
    monkeypatch.setattr("invarlock.checkpoints.reader.Checkpoint.__init__", lambda *_: pytest.fail("weights were read"))
    folder = hub if named == "hub" else Path("reader")
    tiny_models.save(tiny_models.built("BertForQuestionAnswering", **tiny_models.SIZE), folder)
    adapter = ("--set", "model.adapter=hf_auto") if named == "adapter" else ()
    given = "some/model" if named == "hub" else folder
    done = invarlock("compare", "--baseline", given, "--subject", given, "--quiet", *adapter)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "no task measures models of class BertForQuestionAnswering; there are causal, embedding," in done.err
    assert "invarlock_tasks" in done.err


def test_invarlock_tasks_of_a_plugin_measure_what_no_other_owns(judged, module) -> None:
    page = (ROOT / "docs" / "hooks.md").read_text().split("## `invarlock_tasks()`")[1]
    module("next_sentence", re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    model = tiny_models.built("BertForNextSentencePrediction", **tiny_models.SIZE)
    done = judged(model, lambda model: None, "--strict", "-p", "next_sentence")
    assert done.code == 0, done.err
    assert read_report(Path("out"))["metrics"]["primary"]["kind"] == "cosine_distance"


def test_a_task_of_a_plugin_goes_before_a_built_in_one(judged, module) -> None:
    module("mine", MINE)
    done = judged(MODELS["BertModel"](), lambda model: None, "-p", "mine")
    assert done.code == 0, done.err
    assert read_report(Path("out"))["metrics"]["primary"]["kind"] == "mine"


def test_a_task_that_fails_is_named(judged, module) -> None:
    module("mine", MINE.replace('{"text": output}', '{"text": 1 / 0}'))
    done = judged(MODELS["BertModel"](), lambda model: None, "-p", "mine", "--quiet")
    assert done.code == 3
    assert "hooks mine" in done.err and "division by zero" in done.err


def test_a_metric_of_another_task_is_a_mistake(judged) -> None:
    done = judged(MODELS["BertModel"](), lambda model: None, "--set", "eval.metric.kind=perplexity", "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "eval.metric.kind: perplexity does not apply to embedding models; use cosine_distance" in done.err


def test_the_limit_of_a_distance_can_be_set(judged) -> None:
    assert judged(MODELS["BertModel"](), rounded(8), *TEXT, "--set", "eval.metric.limit=1e-9").code == 1
    assert read_report(Path("out"))["metrics"]["primary"]["limit"] == 1e-9


@pytest.mark.parametrize("form", ["terminal", "markdown", "html", "junit"])
def test_no_rendering_calls_a_cosine_a_perplexity(form: str, judged, invarlock) -> None:
    judged(MODELS["BertModel"](), rounded(4), *TEXT)
    shown = invarlock("report", "out", "--format", form).out
    assert "cosine distance" in shown
    assert "perplexity" not in shown.replace("max_pm_ratio", "")


@pytest.mark.parametrize("bits", [2, 8])
def test_a_report_of_a_distance_is_verified(bits: int, judged, invarlock) -> None:
    judged(MODELS["BertForSequenceClassification"](), rounded(bits, per_channel=False), *TEXT)
    done = invarlock("verify", "out")
    assert done.code == 0, done.out + done.err
    again = invarlock(
        "verify", "out", "--baseline", "baseline", "--subject", "subject", "--dataset", DEMO / "text.jsonl"
    )
    assert again.code == 0, again.out + again.err


def test_a_subject_without_the_head_of_its_baseline_is_refused(invarlock) -> None:
    shutil.copytree(DEMO / "checkpoint", "subject")
    config = json.loads(Path("subject/config.json").read_text())
    Path("subject/config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    done = invarlock("compare", "--baseline", DEMO / "checkpoint", "--subject", "subject", "--weights-only")
    assert done.code == 2, done.out
    assert "LlamaModel, which architectures in config.json names, has no head" in done.err
