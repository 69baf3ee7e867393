"""No command and no adapter runs code that lies beside weights, nor asks whether it may, unless it is told to."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO, read_report
from forked import CONSENTING

from invarlock import adapters

NAMES = ("hf_causal", "hf_mlm", "hf_seq2seq", "hf_auto", "auto")
MAP = {
    "AutoConfig": "foreign.Config",
    "AutoModelForCausalLM": "foreign.Model",
    "AutoModelForMaskedLM": "foreign.Model",
    "AutoModelForSeq2SeqLM": "foreign.Model",
    "AutoTokenizer": ["foreign.Tokenizer", None],
    "AutoProcessor": "foreign.Processor",
}
SMALL = ("--set", "dataset.seq_len=32", "--set", "dataset.preview_n=1", "--set", "dataset.final_n=2", "--quiet")
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "run": lambda folder: ["run", "-c", "config.yaml", "--set", f"model.id={folder}", *SMALL],
    "run --stream": lambda folder: ["run", "--stream", "-c", "config.yaml", "--set", f"model.id={folder}", *SMALL],
    "compare": lambda folder: ["compare", "--baseline", "original", "--subject", folder, *SMALL],
    "compare, the baseline": lambda folder: ["compare", "--baseline", folder, "--subject", "original", *SMALL],
    "compare --weights-only": lambda folder: [
        "compare", "--baseline", "original", "--subject", folder, "--weights-only", *SMALL
    ],
    "doctor": lambda folder: ["doctor", "-c", "config.yaml", "--set", f"model.id={folder}"],
}  # fmt: skip


class Unread:
    """A standard input that must not be read."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"standard input was asked for {name}")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def needy(config) -> Path:
    """A checkpoint that cannot be loaded without its code."""
    config().rename("config.yaml")
    shutil.copytree(DEMO / "checkpoint", "original")
    folder = Path("needy")
    shutil.copytree(DEMO / "checkpoint", folder)
    edit_json(folder / "config.json", auto_map=MAP, model_type="foreign")
    edit_json(folder / "tokenizer_config.json", auto_map=MAP, tokenizer_class="ForeignTokenizer")
    (folder / "foreign.py").write_text(f"import pathlib\npathlib.Path({str(Path('RAN').absolute())!r}).touch()\n")
    return folder


@pytest.mark.parametrize("kind", ["foreign", "vit"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_checkpoint_that_needs_code(
    command: str, kind: str, needy: Path, invarlock, monkeypatch
) -> None:
    """Also one whose configuration transformers knows, but not its model."""
    edit_json(needy / "config.json", model_type=kind)
    monkeypatch.setattr(sys, "stdin", Unread())
    done = invarlock(*COMMANDS[command](str(needy)))
    assert not Path("RAN").exists()
    said = done.out if command == "doctor" else done.err
    assert done.code == (1 if command == "doctor" else 2), done.err
    assert "set model.trust_remote_code: true" in said
    assert done.err.count("\n") == (0 if command == "doctor" else 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("adapter", NAMES)
def test_an_adapter_refuses_it_whatever_its_name(
    adapter: str, stream: bool, needy: Path, invarlock, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Unread())
    streaming = ["--stream"] if stream else []
    setting = f"model.adapter={adapter}"
    done = invarlock("run", *streaming, "-c", "config.yaml", "--set", f"model.id={needy}", "--set", setting, *SMALL)
    assert not Path("RAN").exists()
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("adapter", ["HF_Causal_Adapter", "HF_MLM_Adapter", "HF_Seq2Seq_Adapter", "HF_Auto_Adapter"])
def test_an_adapter_called_with_nothing_does_not_trust(adapter: str, needy: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Unread())
    with pytest.raises(Exception, match=r"trust_remote_code|class of transformers"):
        getattr(adapters, adapter)().load_model(str(needy), device="cpu")
    with pytest.raises(Exception, match="trust_remote_code"):
        getattr(adapters, adapter)().load_tokenizer(str(needy))
    assert not Path("RAN").exists()


def test_a_tokenizer_of_its_own_is_not_run_where_the_model_needs_none(needy: Path, invarlock, monkeypatch) -> None:
    """Beside a model that transformers knows, the map of its tokenizer is left alone."""
    monkeypatch.setattr(sys, "stdin", Unread())
    shutil.copyfile(DEMO / "checkpoint" / "config.json", needy / "config.json")
    edit_json(needy / "config.json", auto_map=MAP)
    for command in COMMANDS.values():
        invarlock(*command(str(needy)))
    assert not Path("RAN").exists()


def test_verify_runs_no_code_of_a_baseline(needy: Path, invarlock, monkeypatch) -> None:
    assert invarlock("run", "-c", "config.yaml", "--out", "runs/a", *SMALL).code == 0
    monkeypatch.setattr(sys, "stdin", Unread())
    done = invarlock("verify", "runs/a", "--baseline", str(needy))
    assert done.code == 2, done.err
    assert not Path("RAN").exists()


def test_a_tokenizer_beside_a_gguf_file_is_not_run(needy: Path, invarlock, config, monkeypatch) -> None:
    pytest.importorskip("gguf")
    exported = {"plan": {"bitwidth": 8, "group_size": 32, "scope": "all"}}
    saved = {"dir": "runs/g", "save_model": True, "format": "gguf"}
    assert invarlock("run", "-c", config(edit=exported, output=saved), *SMALL).code == 0
    folder = Path("runs/g/model")
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(folder / name, auto_map=MAP, model_type="foreign", tokenizer_class="ForeignTokenizer")
    shutil.copyfile(needy / "foreign.py", folder / "foreign.py")
    monkeypatch.setattr(sys, "stdin", Unread())
    model = str(folder / "model.gguf")
    for command in ("run", "run --stream", "doctor"):
        invarlock(*COMMANDS[command](model))
        assert not Path("RAN").exists(), command


def test_yes_on_standard_input_is_no_consent(needy: Path, forking) -> None:
    process = forking.start("run", "-c", "config.yaml", "--set", f"model.id={needy}", program=CONSENTING)
    assert process.wait() == 2, process.said()
    assert not Path("RAN").exists()


def test_code_that_is_trusted_runs(needy: Path, invarlock) -> None:
    """Else the tests above could not fail."""
    done = invarlock(
        "run", "-c", "config.yaml", "--set", f"model.id={needy}", "--set", "model.trust_remote_code=true", *SMALL
    )
    assert done.code == 2
    assert Path("RAN").exists()


TRUSTED = ("--set", "model.trust_remote_code=true")
CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class {name}(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_model(name: str, auto_class: str) -> Path:
    """The demo model as a class that its own code defines."""
    folder = Path("own")
    shutil.copytree(DEMO / "checkpoint", folder)
    mapped = {"AutoConfig": "modeling_own.OwnConfig", auto_class: f"modeling_own.{name}"}
    edit_json(folder / "config.json", auto_map=mapped, model_type="own", architectures=[name])
    (folder / "modeling_own.py").write_text(CODE.format(name=name))
    return folder


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("OwnForCausalLM", "AutoModelForCausalLM"),
        ("OwnModel", "AutoModelForCausalLM"),
        ("OwnForCausalLM", "AutoModel"),
        ("OwnForConditionalGeneration", "AutoModel"),
    ],
)
@pytest.mark.parametrize("options", [("--generated",), ("--weights-only",)])
def test_trusted_code_loads_what_transformers_loads_and_is_reported(invarlock, name, auto_class, options) -> None:
    folder = own_model(name, auto_class)
    done = invarlock(
        "compare", "--baseline", DEMO / "checkpoint", "--subject", folder, "--out", "out", *TRUSTED, *options, *SMALL
    )
    assert done.code in (0, 1), done.err
    report = read_report(Path("out"))
    assert report["model"]["own_code"] == ["modeling_own.py"]
    assert {module["change"] for module in report["edit"]["modules"]} == {"unchanged"}
    assert "code beside the weights ran: modeling_own.py" in invarlock("report", "out").out


def test_trusted_code_is_quantized_and_saved_with_the_model(invarlock, config) -> None:
    path = config(model={"id": str(own_model("OwnModel", "AutoModelForCausalLM")), "trust_remote_code": True})
    done = invarlock("run", "-c", path, "--out", "out", "--set", "output.save_model=true", *SMALL)
    assert done.code == 0, done.err
    assert read_report(Path("out"))["model"]["own_code"] == ["modeling_own.py"]
    assert Path("out/model/modeling_own.py").is_file()


def test_no_code_is_reported_where_none_ran(invarlock) -> None:
    assert invarlock("run", "--demo", "--out", "out", *TRUSTED, *SMALL).code == 0
    assert read_report(Path("out"))["model"]["own_code"] == []
