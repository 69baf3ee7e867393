"""One pass over the windows: losses, taps, and how the model is left behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import texts_of
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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
    T5Config,
    T5ForConditionalGeneration,
)

import invarlock
from invarlock.core.errors import PluginError, UsageError
from invarlock.core.progress import showing
from invarlock.core.results import Action
from invarlock.datasets.layout import WindowLayout, Windows
from invarlock.datasets.windows import make_windows
from invarlock.evaluation import passes
from invarlock.evaluation.metric import compare
from invarlock.evaluation.passes import PassResult, measure
from invarlock.evaluation.reach import Reached
from invarlock.evaluation.taps import attached
from invarlock.models import sizes
from invarlock.models.facts import Predicted

CHECKPOINT = Path(invarlock.__file__).parent / "demo" / "checkpoint"
VOCABULARY = 97
ROPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**ROPE))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**ROPE, num_local_experts=4))


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**ROPE, head_dim=8, num_local_experts=4, sliding_window=16))


def bert() -> nn.Module:
    sizes = {name: size for name, size in ROPE.items() if name != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**sizes))


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Predicted, WindowLayout]] = {
    "gpt2": (gpt2, "causal", WindowLayout(24)),
    "llama": (llama, "causal", WindowLayout(24, prefix=(1,), special=(1,))),
    "mixtral": (mixtral, "causal", WindowLayout(24)),
    "gpt_oss": (gpt_oss, "causal", WindowLayout(24)),
    "bert": (bert, "masked", WindowLayout(24, prefix=(1,), suffix=(2,), special=(1, 2, 3), mask=3)),
    "t5": (t5, "seq2seq", WindowLayout(24, suffix=(1,), special=(0, 1), start=0)),
}


def random_windows(layout: WindowLayout, count: int, seed: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    return layout.windows(torch.randint(4, VOCABULARY, (count, layout.text), generator=generator), seed=seed)


@pytest.fixture
def windows() -> tuple[Windows, Windows]:
    return random_windows(WindowLayout(24), 3, seed=1), random_windows(WindowLayout(24), 5, seed=2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama()


# Losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_the_model_itself_in_float64(name: str) -> None:
    maker, task, layout = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = maker()
    final = random_windows(layout, 7)
    measured = measure(model, random_windows(layout, 2, seed=9), final, task=task)

    reference = copy.deepcopy(model).double().eval()
    # The fast kernel of a mixture's experts has no float64.
    reference.set_experts_implementation("eager")
    for row, window in enumerate(final.batches(1)):
        # transformers shifts a causal model's labels, and takes the mean over labels that are not -100.
        with torch.no_grad():
            mean = reference(**window.inputs(), labels=window.labels).loss.item()
        scored = int((window.labels[:, 1:] if task == "causal" else window.labels).ne(-100).sum())
        assert measured.tokens[row] == scored
        assert measured.losses[row] == pytest.approx(mean * scored, rel=1e-5)
    assert measured.losses.dtype == "float64"
    assert measured.tokens.dtype == "int64"


def test_losses_are_the_sums_of_minus_log_softmax(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    measured = measure(model, *windows, task="causal")
    ids = windows[1].input_ids
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(ids).logits
    expected = [
        -sum(math.log(logits[row, at].softmax(0)[ids[row, at + 1]]) for at in range(23)) for row in range(len(ids))
    ]
    assert measured.losses == pytest.approx(expected, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(sum(expected) / (5 * 23)), rel=1e-5)


def test_chunks_and_batches_change_no_loss(
    model: nn.Module, windows: tuple[Windows, Windows], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = measure(model, *windows, task="causal")
    seen: list[int] = []
    log_softmax = passes.functional.log_softmax

    def spy(logits: Tensor, dim: int) -> Tensor:
        seen.append(logits.nelement() * logits.element_size())
        return log_softmax(logits, dim=dim)

    monkeypatch.setattr(sizes, "CPU", replace(sizes.CPU, log_probs=7 * 4 * VOCABULARY, batch_tokens=2 * 24))
    monkeypatch.setattr(passes.functional, "log_softmax", spy)
    in_pieces = measure(model, *windows, task="causal")
    assert max(seen) == 7 * 4 * VOCABULARY
    assert in_pieces.losses == pytest.approx(at_once.losses, rel=1e-6)


def test_the_same_pass_gives_the_same_bits(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    assert (measure(model, *windows, task="causal").losses == measure(model, *windows, task="causal").losses).all()


def test_a_bfloat16_model_is_scored_in_float32(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    exact = measure(model, *windows, task="causal").perplexity
    rounded = measure(model.bfloat16(), *windows, task="causal")
    assert rounded.perplexity == pytest.approx(exact, rel=1e-2)
    with torch.no_grad():
        logits = model.eval()(windows[1].input_ids, use_cache=False).logits.double()
    log_odds = logits[:, :-1].log_softmax(-1).gather(-1, windows[1].input_ids[:, 1:, None])
    assert rounded.losses == pytest.approx(-log_odds.sum((1, 2)).numpy(), rel=1e-4)


def test_a_broken_model_is_measured_as_not_finite(windows: tuple[Windows, Windows]) -> None:
    for name in ("llama", "mixtral", "gpt_oss", "gpt2"):
        model = ARCHITECTURES[name][0]()
        sound = measure(model, *windows, task="causal")
        with torch.no_grad():
            next(weight for path, weight in model.named_parameters() if "layers.1" in path or "h.1" in path).fill_(
                math.nan
            )
        broken = measure(model, *windows, task="causal")
        assert not torch.isfinite(torch.tensor(broken.losses)).any()
        metric = compare(sound, broken, kind="perplexity", limit=1.1, level=0.95, reps=200, seed=0)
        assert (metric.action, metric.edited, metric.ratio, metric.ci) == (Action.ROLLBACK, None, None, None)


def test_perplexity_overflows_to_infinity_and_is_nan_of_nothing() -> None:
    assert PassResult(torch.tensor([1e4]).double().numpy(), torch.tensor([1]).numpy()).perplexity == math.inf
    assert math.isnan(PassResult(torch.tensor([0.0]).double().numpy(), torch.tensor([0]).numpy()).perplexity)


# How windows pass through the model


def test_each_window_passes_once_preview_first(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    seen: list[Tensor] = []
    settings: list[dict[str, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.pop("input_ids"))
        settings.append({name: value for name, value in kwargs.items() if name != "attention_mask"})
        assert kwargs["attention_mask"].all()
        assert not module.training and not torch.is_grad_enabled()

    model.register_forward_pre_hook(lambda m, a, k: note(m, a, dict(k)), with_kwargs=True)
    measure(model, *windows, task="causal", taps=[{"lm_head": Reached()}])
    assert torch.equal(torch.cat(seen), torch.cat([windows[0].input_ids, windows[1].input_ids]))
    assert settings == [{"use_cache": False}] * 2


def test_progress_counts_windows(
    model: nn.Module, windows: tuple[Windows, Windows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "CPU", replace(sizes.CPU, batch_tokens=2 * 24))
    heard: list[tuple[int, int]] = []
    with showing(lambda done, total: heard.append((done, total))):
        measure(model, *windows, task="causal", taps=[{"lm_head": Reached()}])
    assert heard == [(2, 8), (3, 8), (5, 8), (7, 8), (8, 8)]


def test_training_flags_are_put_back_module_by_module(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    measure(model, *windows, task="causal")
    assert [module.training for module in model.modules()] == flags

    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, *windows, task="causal")
    assert [module.training for module in model.modules()] == flags


def test_a_model_with_a_forward_of_its_own_needs_only_logits(windows: tuple[Windows, Windows]) -> None:
    class Own(nn.Module):
        def __init__(self, gives: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.table, self.gives = nn.Embedding(VOCABULARY, VOCABULARY), gives
            self.config = type("Config", (), {"vocab_size": VOCABULARY})()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.gives(self.table(input_ids))

    @dataclass
    class Output:
        logits: Tensor

    assert measure(Own(Output), *windows, task="causal").perplexity > 1
    for gives in (lambda logits: (logits,), lambda logits: logits):
        with pytest.raises(
            PluginError, match=r"^Own: forward returned a (tuple|Tensor) without \.logits; an adapter's"
        ):
            measure(Own(gives), *windows, task="causal")


# Taps


class Rows:
    """Counts the rows that a module was given."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> str:
        self.rows += len(args[0] if args else kwargs["hidden_states"])
        return "ignored"

    def result(self) -> int:
        return self.rows


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_taps_see_the_preview_windows_only(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    untapped = measure(model, *windows, task="causal")
    one, other, same_place = Rows(), Rows(), Rows()
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn"]
    guards = [{names[0]: one, names[1]: other}, {names[0]: same_place}]
    tapped = measure(model, *windows, task="causal", taps=guards)
    assert one.result() == other.result() == same_place.result() == len(windows[0])
    assert (tapped.losses == untapped.losses).all()
    assert hooks(model) == 0


def test_taps_come_off_whatever_happens(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    class Failing(Rows):
        def __call__(self, *call: Any) -> str:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        measure(model, *windows, task="causal", taps=[{"lm_head": Rows()}, {"model.norm": Failing()}])
    assert hooks(model) == 0


def test_a_tap_on_no_module_is_said_with_the_nearest(model: nn.Module) -> None:
    taps = {"lm_head": Rows(), "model.layers.0.mlp.downproj": Rows()}
    with (
        pytest.raises(
            PluginError, match=r"LlamaForCausalLM has no module 'model\.layers\.0\.mlp\.downproj' to tap; did you mean"
        ),
        attached(model, taps),
    ):
        pass
    assert hooks(model) == 0


# A trained model


@dataclass(frozen=True)
class Demo:
    provider: str = "demo"
    path: str | None = None
    name: str | None = None
    text_field: str = "text"
    split: str = "validation"
    seq_len: int = 128
    stride: int | None = None
    preview_n: int = 2
    final_n: int = 24
    seed: int = 42


def test_damage_to_a_trained_model_raises_its_perplexity() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    preview, final = make_windows(Demo(), model, tokenizer, task="causal", documents=texts_of(Demo()))
    sound = measure(model, preview, final, task="causal")
    assert 5 < sound.perplexity < 20
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    def noisy(share: float) -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator) * weights[name].std()
                weight.copy_(weights[name] + (share * noise if "mlp" in name else 0))
        edited = measure(model, preview, final, task="causal")
        return compare(sound, edited, kind="perplexity", limit=1.1, level=0.95, reps=500, seed=0)

    untouched, slight, strong = noisy(0.0), noisy(0.1), noisy(0.6)
    assert (untouched.ratio, untouched.ci, untouched.action) == (1.0, (1.0, 1.0), Action.CONTINUE)
    assert slight.action is Action.CONTINUE
    assert strong.action is Action.ROLLBACK
    assert 1.0 < slight.ratio < strong.ratio
    assert slight.ci[0] <= slight.ratio <= slight.ci[1] < strong.ci[0]


def test_a_trained_model_writes_windows_that_judge_like_text() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    preview, final = make_windows(Demo("generated", seq_len=64, final_n=12), model, None, task="causal")
    assert 5 < measure(model, preview, final, task="causal").perplexity < 30


class Small(nn.Module):
    """A model on a device that has memory for two windows at once."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.config, self.most, self.seen = model, model.config, most, []

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.seen.append(len(input_ids))
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_batches_are_halved_until_they_fit(
    model: nn.Module, windows: tuple[Windows, Windows], caplog: pytest.LogCaptureFixture
) -> None:
    at_once, small = measure(model, *windows, task="causal"), Small(model, most=2)
    for _ in range(2):
        halved = measure(small, *windows, task="causal", taps=[{"": Reached()}])
        assert halved.losses == pytest.approx(at_once.losses, rel=1e-6)
    assert max(small.seen) <= 2
    assert sum(small.seen) == 2 * sum(map(len, windows)), "each window once"
    assert [record.message for record in caplog.records] == ["cpu has no memory for 3 windows at once; going on with 1"]


def test_a_device_without_memory_for_a_window_is_bad_input(model: nn.Module, windows: tuple[Windows, Windows]) -> None:
    with pytest.raises(UsageError, match=r"^model\.device: cpu has no memory for a batch of 1 x 24 tokens"):
        measure(Small(model, most=0), *windows, task="causal")
