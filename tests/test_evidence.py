"""``invarlock verify`` and ``--sign``: what does not agree is found, and what agrees is not doubted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.cli.main import main
from invarlock.quantization import Plan, quantize_model

BASELINE = DEMO / "checkpoint"
SMALL = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=6", "--set", "dataset.preview_n=2")
GUARDS = ("--set", "guards.order=[invariants, spectral]")
SAVED = ("--set", "output.save_model=true")


def write_key(path: Path) -> Path:
    """A private key as ``openssl ecparam -name prime256v1 -genkey`` writes it, and the public one beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    path.write_bytes(secret)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, an edited checkpoint, and signed runs of every kind."""
    root = tmp_path_factory.mktemp("made")
    key = write_key(root / "key.pem")
    write_key(root / "other.pem")
    model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="float32")
    quantize_model(model, Plan(8, scope="all"))
    model.save_pretrained(root / "subject")
    AutoTokenizer.from_pretrained(BASELINE).save_pretrained(root / "subject")

    def run(name: str, *arguments: object) -> None:
        words = (*arguments, *SMALL, *GUARDS, "--sign", key, "--out", root / name, "-q")
        assert main([str(word) for word in words]) in (0, 1)

    run("accepted", "run", "--demo", *SAVED)
    run("rejected", "run", "--demo", *SAVED, "--set", "edit.plan.bitwidth=2", "--set", "edit.retry.max_attempts=2")
    run("streamed", "run", "--demo", "--stream", *SAVED)
    compare = ("compare", "--baseline", BASELINE, "--subject", root / "subject")
    run("compared", *compare, "--dataset", DEMO / "text.jsonl")
    run("weights", *compare, "--weights-only")
    run("inconclusive", "run", "--demo", "--set", "edit.plan.bitwidth=4", "--set", "eval.max_pm_ratio=1.03")
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run under another name, which a signature does not mind."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / f"{name}-copied"))


# -- what agrees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accepted", "rejected", "inconclusive", "streamed", "compared", "weights"])
def test_an_untouched_run_agrees_and_so_does_its_signature(invarlock, made: Path, name: str) -> None:
    done = invarlock("verify", made / name, "--public-key", made / "key.pub")
    assert (done.code, done.err) == (0, ""), done.out
    assert done.out.startswith("AGREES in all that was checked\n")
    assert "checked      signature of every file in the folder" in done.out
    assert "UNSIGNED" not in done.out
    assert "not checked  losses, measured again" in done.out


def test_what_was_not_checked_is_said(invarlock, made: Path, copied) -> None:
    done = invarlock("verify", made / "accepted")
    assert "not checked  signature: give --public-key" in done.out
    assert done.out.endswith("\nUNSIGNED: consistent with itself, which a forger can be, too\n")
    run = copied("accepted")
    (run / "run.sigstore.json").unlink()
    assert "not checked  signature: there is none" in invarlock("verify", run).out


def test_the_librarys_own_tool_verifies_a_run(made: Path) -> None:
    command = ["verify", "key", "--signature", made / "accepted/run.sigstore.json", "--public_key", made / "key.pub"]
    done = subprocess.run([sys.executable, "-m", "model_signing", *command, made / "accepted"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["inconclusive", "compared"])
def test_a_report_of_an_earlier_build_that_names_no_ending_agrees(invarlock, copied, name: str) -> None:
    path = copied(name) / "report.json"
    report = json.loads(path.read_text())
    primary, verdict = report["metrics"]["primary"], report["verdict"]
    del verdict["ending"]
    for finding in verdict["findings"]:
        del finding["inconclusive"]
    if primary.pop("undecided"):
        said = primary["message"]
        primary["message"] = said[: said.index(", and its lower end")]
        told = json.dumps(verdict).replace(said, primary["message"])
        report["verdict"] = json.loads(told)
    path.write_text(json.dumps(report))
    assert "AGREES in all that was checked" in (done := invarlock("verify", path.parent)).out, done.out
    word = "REJECTED" if name == "inconclusive" else "ACCEPTED"
    assert invarlock("report", path).out.startswith(word)


# -- a report that was tampered with -----------------------------------------------------------------------------------


def set_in(report: Any, place: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in parents:
        report = report[part]
    report[last] = value


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("accepted", "metrics.windows.edited.3", 1.5, "metrics.primary.ratio: stored "),
        ("accepted", "metrics.windows.tokens.0", 62, "metrics.primary.tokens: stored "),
        ("rejected", "metrics.primary", None, "metrics.primary (whether measured): stored false, recomputed true"),
        ("rejected", "metrics.predictions", None, "metrics.predictions (whether measured): stored false"),
        ("rejected", "metrics.windows", None, "metrics.primary (whether measured): stored true, recomputed false"),
        ("rejected", "metrics.primary.ratio", 1.01, "metrics.primary.ratio: stored 1.01, recomputed "),
        ("rejected", "metrics.primary.ci.1", 1.05, "metrics.primary.ci[1]: stored 1.05, recomputed "),
        ("rejected", "metrics.primary.action", "continue", 'metrics.primary.action: stored "continue", recomputed "rollback"'),
        ("rejected", "metrics.predictions.window_p95", 0.0, "metrics.predictions.window_p95: stored 0.0, recomputed "),
        ("rejected", "metrics.predictions.kl_mean", 0.0, "metrics.predictions.message: stored "),
        ("rejected", "metrics.predictions.limits.kl_p95", 9.0, "metrics.predictions.limits.kl_p95: stored 9.0, recomputed "),
        ("accepted", "guards.0.action", "warn", 'verdict.findings[0].action: stored "continue", recomputed "warn"'),
        ("accepted", "guards.0.error", "it broke", "guards[0].action: stored"),
        ("accepted", "guards.0.passed", False, "guards[0].passed: stored false, recomputed true"),
        ("accepted", "guards.0.passed", None, "guards[0].passed: stored null, recomputed true"),
        ("accepted", "guards.0.prepare.ready", False, 'guards[0].action: stored "continue", recomputed "abort"'),
        ("accepted", "edit.modules.0.bits", 4, "edit.modules[0].bits: stored 4, recomputed 8"),
        ("accepted", "edit.modules.0.change", "unchanged", 'edit.modules[0].change: stored "unchanged", recomputed "quantized"'),
        ("accepted", "edit.modules.0.relative_error", 1e-9, "edit.modules[0].sqnr_db: stored "),
        ("accepted", "edit.modules.0.role", "head", 'edit.modules[0].role: stored "head", expected "attention or ffn"'),
        ("accepted", "edit.modules.0.name", "model.layers.1.mlp.down_proj", "edit.modules (different names): stored "),
        ("accepted", "edit.modules", [], "metrics.windows (whether measured): stored true, recomputed false"),
        ("compared", "edit.modules.0.bits", 2, "edit.modules[0].bits: stored 2, recomputed "),
        ("accepted", "model.id", "another", 'model.id: stored "another", recomputed "'),
        ("rejected", "attempts.0.bitwidth", 3, "attempts[*].bitwidth"),
        ("rejected", "verdict.action", "continue", 'verdict.action: stored "continue", recomputed "rollback"'),
        ("rejected", "verdict.accepted", True, "verdict.accepted: stored true, recomputed false"),
        ("rejected", "verdict.exit_code", 0, "verdict.exit_code: stored 0, recomputed 1"),
        ("rejected", "verdict.decided_by", "nobody", 'verdict.decided_by: stored "nobody"'),
        ("rejected", "verdict.reasons", [], "verdict.reasons: stored []"),
        ("rejected", "verdict.ending", "inconclusive", 'verdict.ending: stored "inconclusive", recomputed "rejected"'),
        ("inconclusive", "verdict.ending", "rejected", 'verdict.ending: stored "rejected", recomputed "inconclusive"'),
        ("inconclusive", "metrics.primary.undecided", None, "metrics.primary.undecided: stored null, recomputed "),
        ("inconclusive", "metrics.primary.undecided.windows", 9, "metrics.primary.undecided.windows: stored 9, recomputed "),
        ("rejected", "verdict.suspects", [], "verdict.suspects: stored []"),
        ("rejected", "verdict.rests_on", "900 + 900 windows of the dataset", "verdict.rests_on: stored "),
        ("rejected", "verdict.findings.2.action", "continue", "verdict.findings[2].action: stored "),
        ("accepted", "config.eval.max_pm_ratio", 9.0, "config_sha256: stored "),
        ("accepted", "config.guards.order", ["invariants"], "guards[*].name: stored "),
        ("accepted", "edit.plan.bitwidth", 2, "edit.plan.bitwidth: stored 2, recomputed 8"),
        ("accepted", "edit.params_changed", 1, "edit.params_changed: stored 1, recomputed "),
        ("rejected", "attempts.1.ratio", 1.0, "attempts[-1].ratio: stored 1.0, recomputed "),
        ("rejected", "attempts.0.action", "abort", "attempts[:-1].action"),
        ("rejected", "model.restored", None, "model.restored: stored null, recomputed true"),
        ("rejected", "model.fingerprint_after", "0", 'model.fingerprint_after: stored "0", recomputed '),
        ("accepted", "model.restored", True, "model.restored: stored true, recomputed null"),
        ("accepted", "artifacts.model/config\\.json", "0" * 64, 'model/config.json: stored "000000'),
        ("compared", "edit.plan.families", [], "edit.plan.families: stored []"),
        ("weights", "verdict.rests_on", "2 + 6 windows", "verdict.rests_on: stored "),
    ],
)  # fmt: skip
def test_a_tampered_report_is_found_and_told(invarlock, made, copied, name, place, value, said) -> None:
    run = copied(name)
    report = read_report(run)
    # A point in a name is no step down.
    first, *_ = place.split(".")
    if first == "artifacts":
        report["artifacts"][place.removeprefix("artifacts.").replace("\\", "")] = value
    else:
        set_in(report, place, value)
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run)
    assert done.code == 1
    assert f"  - {said}" in done.out
    assert "run.sigstore.json: stored " in invarlock("verify", run, "--public-key", made / "key.pub").out


@pytest.mark.parametrize("tokens", [[0] * 6, [0, 0, 0, 0, 0, 63], [63] * 6])
@pytest.mark.parametrize("losses", [[0.0] * 6, ["nan"] * 6, ["inf"] * 6, [1e308] * 6])
def test_windows_of_any_figures_are_recomputed(invarlock, copied, tokens: list[int], losses: list[Any]) -> None:
    run = copied("accepted")
    report = read_report(run)
    report["metrics"]["windows"] = {"tokens": tokens, "baseline": losses, "edited": losses[::-1]}
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run)
    assert (done.code, done.err) == (1, "")
    assert "metrics.primary.message: stored " in done.out
    assert "UNSIGNED" not in done.out


def test_a_rollback_that_left_bits_untried_is_found(invarlock, copied) -> None:
    run = copied("rejected")
    report = read_report(run)
    del report["attempts"][0]
    report["attempts"][0]["attempt"] = 1
    (run / "report.json").write_text(json.dumps(report))
    assert "  - attempts[*].bitwidth: stored [3], recomputed [2, 3]" in invarlock("verify", run).out


def test_a_named_pipe_is_not_waited_for(invarlock) -> None:
    Path("run").mkdir()
    os.mkfifo("run/report.json")
    done = invarlock("verify", "run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is no plain file" in done.err


def test_what_a_report_says_cannot_steer_the_terminal(invarlock, copied) -> None:
    run = copied("accepted")
    report = read_report(run)
    report["verdict"]["decided_by"] = "\x1b[2J[bold]\nAGREES"
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run)
    assert done.code == 1
    assert r'verdict.decided_by: stored "\u001b[2J[bold]\nAGREES"' in done.out


def test_plugins_that_a_report_names_are_not_imported(invarlock, module, copied) -> None:
    module("stranger", "raise SystemExit('imported')")
    run = copied("accepted")
    report = read_report(run)
    report["config"]["plugins"], report["config"]["model"]["trust_remote_code"] = ["stranger"], True
    (run / "report.json").write_text(json.dumps(report))
    assert "config_sha256" in invarlock("verify", run, "--baseline", BASELINE).out
    assert "stranger" not in sys.modules


def test_code_beside_weights_never_runs_whatever_the_report_says(invarlock, made: Path, copied) -> None:
    shutil.copytree(BASELINE, "coded")
    settings = json.loads(Path("coded/config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    Path("coded/config.json").write_text(json.dumps(settings))
    Path("coded/evil.py").write_text("raise SystemExit('it ran')")
    run = copied("accepted")
    report = read_report(run)
    report["config"]["model"]["trust_remote_code"] = True
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run, "--baseline", "coded")
    assert done.code == 1
    assert "checked      losses of the baseline model" in done.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "is no report-v1"),
        ("[" * 5000, "is no report-v1"),
        ("{}", "Field required"),
    ],
)
def test_a_run_without_a_report_that_can_be_read_is_a_usage_error(invarlock, text: str | None, said: str) -> None:
    Path("run").mkdir()
    if text is not None:
        Path("run/report.json").write_text(text)
    done = invarlock("verify", "run")
    assert done.code == 2
    assert said in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "place", [("guards", 0, "origin"), ("guards", 1, "error"), ("verdict", "findings", 0, "failed")]
)
def test_a_report_lacks_no_key_of_a_result(invarlock, copied, place: tuple[Any, ...]) -> None:
    run = copied("accepted")
    report = part = read_report(run)
    for step in place[:-1]:
        part = part[step]
    del part[place[-1]]
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run)
    assert done.code == 2
    assert f".{place[-1]}: Field required" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("metrics.windows.baseline", []),
        ("metrics.windows.tokens.0", 10**30),
        ("metrics.windows.tokens.0", -1),
        ("metrics.windows.baseline.0", "many"),
        ("metrics.primary.ratio", {}),
        ("metrics", None),
        ("attempts", []),
        ("guards.0.action", "maybe"),
        ("config.eval", "none"),
    ],
)
def test_a_report_of_impossible_values_is_broken(invarlock, copied, place: str, value: Any) -> None:
    run = copied("accepted")
    report = read_report(run)
    set_in(report, place, value)
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run)
    assert (done.code, done.err.count("\n")) == (2, 1), done.out + done.err


# -- files -------------------------------------------------------------------------------------------------------------


def flip(run: Path) -> None:
    path = run / "model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def link(run: Path) -> None:
    """To the same bytes elsewhere, which somebody could change later."""
    (run / "model/config.json").rename(run.with_name("elsewhere"))
    (run / "model/config.json").symlink_to(run.with_name("elsewhere"))


@pytest.mark.parametrize("name", ["accepted", "streamed"])
@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (flip, "model/model.safetensors: stored "),
        (lambda run: (run / "model/modeling.py").write_text("1"), "model/modeling.py: stored nothing, found "),
        (lambda run: (run / "model/tokenizer.json").unlink(), "model/tokenizer.json: stored "),
        (lambda run: (run / "model/report.json").write_text("{}"), "model/report.json: stored "),
        (link, 'model/config.json: stored "'),
        (lambda run: shutil.rmtree(run / "model"), "model/config.json: stored "),
    ],
    ids=["flipped", "added", "removed", "copy", "linked", "all"],
)
def test_a_changed_added_or_removed_file_is_found(invarlock, made, copied, name, tamper, said) -> None:
    run = copied(name)
    tamper(run)
    done = invarlock("verify", run)
    assert done.code == 1
    assert f"  - {said}" in done.out
    assert "run.sigstore.json: stored " in invarlock("verify", run, "--public-key", made / "key.pub").out


def test_a_rejected_run_has_no_model(invarlock, made: Path, copied) -> None:
    run = copied("rejected")
    shutil.copytree(made / "accepted/model", run / "model")
    done = invarlock("verify", run)
    assert done.code == 1
    assert '  - model: stored nothing, found "a folder"' in done.out


def test_files_outside_the_folder_are_not_opened(invarlock, copied, tmp_path: Path) -> None:
    run = copied("accepted")
    report = read_report(run)
    report["artifacts"]["model/../../secret"] = "0" * 64
    (run / "report.json").write_text(json.dumps(report))
    (tmp_path / "secret").write_text("x")
    done = invarlock("verify", run)
    assert f'  - model/../../secret: stored "{"0" * 64}", found nothing' in done.out


# -- signatures --------------------------------------------------------------------------------------------------------


def test_a_file_beside_the_model_is_found_by_the_signature(invarlock, made: Path, copied) -> None:
    run = copied("rejected")
    (run / ".gitattributes").write_text("x")
    done = invarlock("verify", run)
    assert done.code == 0
    assert "not checked  .gitattributes: no digest vouches for it" in done.out
    done = invarlock("verify", run, "--public-key", made / "key.pub")
    assert done.code == 1
    assert "Extra files found" in done.out and ".gitattributes" in done.out


def test_another_key_is_found(invarlock, made: Path) -> None:
    done = invarlock("verify", made / "accepted", "--public-key", made / "other.pub")
    assert done.code == 1
    assert "Key mismatch" in done.out


def resign(text: str) -> str:
    bundle = json.loads(text)
    signature = bundle["dsseEnvelope"]["signatures"][0]["sig"]
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = (
        signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    )
    return json.dumps(bundle)


@pytest.mark.parametrize(
    "tamper",
    [resign, lambda text: text[: len(text) // 2], lambda text: "{}", lambda text: "[]", lambda text: "\xff", None],
)
def test_a_changed_or_missing_signature_is_found(invarlock, made: Path, copied, tamper) -> None:
    run = copied("rejected")
    path = run / "run.sigstore.json"
    path.unlink() if tamper is None else path.write_text(tamper(path.read_text()))
    done = invarlock("verify", run, "--public-key", made / "key.pub")
    assert (done.code, done.err) == (1, ""), done.out + done.err
    assert "  - run.sigstore.json: stored " in done.out


@pytest.mark.parametrize("content", [None, "no key", "public"])
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_key_that_cannot_be_used_is_said_before_anything_is_measured(invarlock, made, content, command) -> None:
    key = Path("a.pem")
    if content is not None:
        key.write_text((made / "key.pub").read_text() if content == "public" else content)
    what = ("--demo",) if command == "run" else ("--baseline", "nowhere", "--subject", "nowhere")
    done = invarlock(command, *what, "--sign", key, "--out", "out")
    assert done.code == 2
    assert f"--sign {key.absolute()}" in done.err and done.err.count("\n") == 1
    assert not Path("out").exists()
    assert invarlock("verify", made / "rejected", "--public-key", "nowhere").code == 2


def test_a_key_of_another_curve_is_refused(invarlock, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256K1())
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(key.private_bytes(*pem))
    done = invarlock("run", "--demo", "--sign", "key.pem")
    assert done.code == 2
    assert "P-256" in done.err


def test_force_signs_anew_and_nothing_else_is_signed_along(invarlock, made: Path, copied) -> None:
    run = copied("accepted")
    arguments = (
        "run",
        "--demo",
        *SMALL,
        "--set",
        "guards.order=[invariants]",
        "--out",
        run,
        "--sign",
        made / "key.pem",
    )
    assert invarlock(*arguments, "--force").code == 0
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "report.json", "run.sigstore.json"]
    assert invarlock("verify", run, "--public-key", made / "key.pub").code == 0
    (run / "notes.txt").write_text("mine")
    done = invarlock(*arguments, "--force")
    assert done.code == 2
    assert "notes.txt, which would not be signed along" in done.err


def test_what_a_streamed_run_left_when_it_was_cut_off_is_not_signed_along(invarlock, made: Path) -> None:
    for folder in (".model.partial", ".model.journals"):
        Path("out", folder).mkdir(parents=True)
    arguments = ("--demo", "--stream", *SMALL, "--set", "guards.order=[invariants]", *SAVED, "--out", "out")
    assert invarlock("run", *arguments, "--sign", made / "key.pem").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "model",
        "report.html",
        "report.json",
        "run.sigstore.json",
    ]
    assert invarlock("verify", "out", "--public-key", made / "key.pub").code == 0


def test_without_the_library_it_is_said_how_to_install_it(invarlock, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    done = invarlock("run", "--demo", "--sign", "key.pem")
    assert done.code == 2
    assert "pip install 'invarlock[sign]'" in done.err


# -- with the checkpoints at hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("accepted", ("--baseline", BASELINE)),
        ("accepted", ("--subject", "model")),
        ("streamed", ("--baseline", BASELINE)),
        ("rejected", ("--baseline", BASELINE)),
        ("compared", ("--baseline", BASELINE, "--subject", "subject")),
        ("weights", ("--baseline", BASELINE, "--subject", "subject")),
    ],
)
def test_the_right_checkpoints_give_the_same_losses(invarlock, made: Path, name: str, given) -> None:
    paths = {"model": made / name / "model", "subject": made / "subject"}
    done = invarlock("verify", made / name, *(paths.get(word, word) for word in given))
    assert done.code == 0, done.out + done.err
    if name != "weights":
        side = "edited" if given[0] == "--subject" else "baseline"
        assert f"checked      losses of the {side} model, measured again" in done.out
    assert ("losses of the edited model, measured again: its checkpoint" in done.out) == (name == "rejected")


def test_an_edited_baseline_and_an_edited_subject_are_found(invarlock, made: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "subject", dtype="float32")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained("other")
    AutoTokenizer.from_pretrained(BASELINE).save_pretrained("other")
    done = invarlock("verify", made / "compared", "--baseline", "other", "--subject", "other")
    assert done.code == 1
    for said in (
        "model.fingerprint_before",
        "model.fingerprint_after",
        "metrics.windows.baseline[",
        "metrics.windows.edited[",
    ):
        assert f"  - {said}" in done.out


@pytest.mark.parametrize("tamper", ["more tokens", "fewer windows"])
def test_other_tokens_or_windows_than_those_measured_are_found(invarlock, made: Path, copied, tamper: str) -> None:
    run = copied("rejected")
    report = read_report(run)
    windows = report["metrics"]["windows"]
    if tamper == "more tokens":
        windows["tokens"] = [1000 * count for count in windows["tokens"]]
    else:
        windows |= {name: values and values[:-1] for name, values in windows.items()}
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run, "--baseline", BASELINE)
    assert done.code == 1, done.err
    assert "metrics.windows.tokens (beside baseline): stored " in done.out


def test_text_that_is_elsewhere_is_given(invarlock, made: Path, copied) -> None:
    run = copied("compared")
    report = read_report(run)
    report["config"]["dataset"]["path"] = "/nowhere/text.jsonl"
    (run / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", run, "--baseline", BASELINE)
    assert done.code == 2
    assert "give the data with --dataset" in done.err
    done = invarlock("verify", run, "--baseline", BASELINE, "--dataset", DEMO / "text.jsonl")
    assert "checked      losses of the baseline model" in done.out
    assert "metrics.windows" not in done.out


# -- whatever the verdict rests on -------------------------------------------------------------------------------------


GUARD = "from invarlock import hookimpl\n@hookimpl\ndef invarlock_prepare(model):\n    return {prepared}\n@hookimpl\ndef invarlock_validate(model):\n    {body}\n"


@pytest.mark.parametrize(
    ("prepared", "body", "options"),
    [
        ("None", "raise RuntimeError('it broke')", ()),
        ("{'ready': False, 'message': 'not today'}", "return {}", ()),
        ("None", "return {'passed': False, 'action': 'abort'}", ("--set", "guards.fail_fast=true")),
        ("None", "return {'passed': True, 'action': 'warn', 'message': 'hm'}", ("--strict",)),
        ("None", "return {'passed': False, 'action': 'rollback', 'metrics': {'suspects': [{'module': 'm'}]}}", ("--set", "edit.retry.max_attempts=7")),
    ],
    ids=["fails", "not ready", "fails fast", "warns", "rolls back"],
)  # fmt: skip
def test_a_run_agrees_whatever_its_guards_did(invarlock, module, prepared: str, body: str, options) -> None:
    module("said", GUARD.format(prepared=prepared, body=body))
    order = "guards.order=[said, invariants]"
    assert invarlock("run", "--demo", "-p", "said", *SMALL, "--set", order, *options, "--out", "out").code in (1, 3)
    done = invarlock("verify", "out")
    assert done.code == 0, done.out + done.err


def test_a_comparison_agrees_whose_guard_was_not_ready(invarlock, module, made: Path) -> None:
    module("said", GUARD.format(prepared="{'ready': False}", body="return {}"))
    sides = ("--baseline", BASELINE, "--subject", made / "subject", "--weights-only")
    assert invarlock("compare", *sides, "-p", "said", "--set", "guards.order=[said]", "--out", "out").code == 1
    done = invarlock("verify", "out")
    assert done.code == 0, done.out + done.err


def spoil(weight: torch.Tensor) -> None:
    weight[0] = torch.nan


@pytest.mark.parametrize("side", ["baseline", "subject"])
def test_a_comparison_agrees_where_losses_are_not_finite(invarlock, made: Path, side: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="float32")
    with torch.no_grad():
        spoil(model.model.layers[1].mlp.down_proj.weight)
    model.save_pretrained("spoilt")
    AutoTokenizer.from_pretrained(BASELINE).save_pretrained("spoilt")
    sides = {"--baseline": BASELINE, "--subject": BASELINE} | {f"--{side}": "spoilt"}
    words = [word for pair in sides.items() for word in pair]
    assert invarlock("compare", *words, "--dataset", DEMO / "text.jsonl", *SMALL, *GUARDS, "--out", "out").code == 1
    done = invarlock("verify", "out", *words)
    assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("damage", ["vocabulary", "tokenizer"])
def test_a_comparison_agrees_that_something_else_objected_to(invarlock, made: Path, damage: str) -> None:
    shutil.copytree(made / "subject", "subject")
    if damage == "vocabulary":
        model = AutoModelForCausalLM.from_pretrained(BASELINE)
        model.resize_token_embeddings(300)
        model.save_pretrained("subject")
    else:
        words = json.loads(Path("subject/tokenizer.json").read_text())
        table = words["model"]["vocab"]
        table["A"], table["B"] = table["B"], table["A"]
        Path("subject/tokenizer.json").write_text(json.dumps(words))
    arguments = ("--baseline", BASELINE, "--subject", "subject")
    invarlock("compare", *arguments, "--dataset", DEMO / "text.jsonl", *SMALL, *GUARDS, "--out", "out")
    assert len(read_report(Path("out"))["verdict"]["findings"]) == (3 if damage == "vocabulary" else 5)
    done = invarlock("verify", "out", *arguments)
    assert done.code == 0, done.out + done.err
