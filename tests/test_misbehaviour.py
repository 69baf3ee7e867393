"""Plugins that end processes, change what is judged, rewrite reports or leave things running: named, and undone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, read_report, slow
from forked import Forked

from invarlock.testing import check_guard, checking

OK = "{'passed': True, 'action': 'continue', 'message': 'fine'}"
ESCAPES = ("SystemExit(0)", "type('Odd', (BaseException,), {})()")


def guard(**bodies: str) -> str:
    """A module with these hooks; a guard that passes, unless ``validate`` is among them."""
    bodies = {"validate": f"return {OK}"} | bodies
    arguments = {
        "observe": "model", "prepare": "model, calib", "validate": "model, adapter, context",
        "attempt_finished": "attempt, report", "run_finished": "report", "report_sections": "report",
    }  # fmt: skip
    hooks = (f"@hookimpl\ndef invarlock_{name}({arguments[name]}):\n    {body}\n" for name, body in bodies.items())
    return "import torch\nfrom invarlock import hookimpl\n" + "".join(hooks)


@pytest.fixture
def judged(invarlock, module, config):
    """Run the demo model under a guard of this source, with two bystanders, and the model saved if it is accepted."""

    def run(source: str, *options: str, save: bool = True):
        module("odd", source)
        path = config(guards={"order": ["invariants", "odd", "invariants"]}, output={"save_model": save})
        return invarlock("run", "-c", path, "-p", "odd", "--out", "out", *options)

    return run


def saved() -> list[str]:
    return sorted(path.name for path in Path("out").glob("*"))


# -- exit status -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ESCAPES)
@pytest.mark.parametrize("hook", ["observe", "prepare", "validate"])
def test_what_ends_a_process_is_the_guards_error(judged, hook: str, error: str) -> None:
    done = judged(guard(**{hook: f"raise {error}"}))
    assert done.code == 3
    report = read_report(Path("out"))
    assert report["verdict"]["decided_by"] == "guard odd"
    assert "(odd.py:" in report["guards"][1]["message"]
    assert [report["guards"][place]["error"] for place in (0, 2)] == [None, None]


@pytest.mark.parametrize("error", ESCAPES)
@pytest.mark.parametrize("hook", ["attempt_finished", "run_finished", "report_sections"])
def test_what_ends_a_process_after_the_verdict_is_named_and_nothing_is_saved(judged, hook: str, error: str) -> None:
    done = judged(guard(**{hook: f"raise {error}"}))
    assert done.code == 3
    assert "guard odd: invarlock_" in done.err
    assert "report.json" not in saved()


@pytest.mark.parametrize("error", ESCAPES)
def test_a_tap_that_ends_the_process_is_the_guards_error(judged, error: str) -> None:
    tap = f"class Tap:\n def __call__(self, *given): raise {error}\n def result(self): pass\n"
    assert judged(tap + guard(observe="return {'lm_head': Tap()}")).code == 3
    assert "tap on lm_head" in read_report(Path("out"))["guards"][1]["message"]


@pytest.mark.parametrize("error", ESCAPES)
def test_a_thread_that_ends_the_process_is_the_guards_error(judged, error: str) -> None:
    thread = f"import threading\ndef work(): raise {error}\n"
    started = f"thread = threading.Thread(target=work); thread.start(); thread.join(); return {OK}"
    assert judged(thread + guard(validate=started)).code == 3
    assert "a thread of it failed" in " ".join(read_report(Path("out"))["verdict"]["reasons"])


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(0)",
        "raise GeneratorExit",
        "from invarlock.core.api import Guard\nclass G(Guard):\n def __init__(self): raise SystemExit(0)\n def validate(self, model, adapter, context): pass",
        "from invarlock.core.api import Guard\nclass G(Guard):\n requires = 5\n def validate(self, model, adapter, context): pass",
        "from invarlock.core.api import Guard\nclass G(Guard):\n requires = 'numpy'\n def validate(self, model, adapter, context): pass",
        "from invarlock.core.api import Guard\nclass G(Guard):\n requires = ['>=1']\n def validate(self, model, adapter, context): pass",
        "from invarlock import hookimpl\nclass A:\n @hookimpl(wrapper=True)\n def invarlock_validate(self): return None\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @hookimpl(hookwrapper=True)\n def invarlock_validate(self): yield\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_validate(self): yield\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @hookimpl\n async def invarlock_validate(self): pass\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_validate(self, *given): pass\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @property\n def invarlock_validate(self): raise SystemExit(0)\nG = A()",
        "from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_add_commands(self, subparsers): raise SystemExit(0)\nG = A()",
    ],
)  # fmt: skip
def test_a_plugin_that_nobody_asked_for_changes_nothing(invarlock, site, source: str) -> None:
    site("odd-dist", "[invarlock.guards]\nodd = odd_module:G\n", odd_module=source)
    listed = invarlock("plugins", "--only", "error", "--json")
    assert [item["name"] for item in json.loads(listed.out)["items"]] == ["odd"]
    assert json.loads(listed.out)["items"][0]["error"]
    assert listed.err == ""
    assert (listed.code, invarlock("--version").code, invarlock("config").code) == (0, 0, 0)


@pytest.mark.parametrize("source", ["raise SystemExit(0)", "raise SystemExit(1)", "raise GeneratorExit"])
def test_an_import_that_ends_the_process_is_the_plugins_failure_where_it_was_asked_for(
    invarlock, module, site, source: str
) -> None:
    module("odd", source)
    done = invarlock("-p", "odd", "plugins")
    assert done.code == 3
    assert "odd" in done.err
    site("odd-dist", "[invarlock.guards]\ninstalled = odd\n")
    assert invarlock("-p", "installed", "plugins").code == 3


def test_requirements_are_read_as_what_they_say(invarlock, site) -> None:
    for name, requires in (("met", "numpy>=1.26"), ("unmet", "numpy>=999"), ("absent", "no-such-thing>=1")):
        source = f"from invarlock.core.api import Guard\nclass G(Guard):\n requires = ['{requires}']\n def validate(self, model, adapter, context): pass"
        site(f"{name}-dist", f"[invarlock.guards]\n{name} = {name}_module:G\n", **{f"{name}_module": source})
    items = {item["name"]: item for item in json.loads(invarlock("plugins", "--json").out)["items"]}
    assert items["met"]["status"] == "ready"
    assert items["unmet"]["status"] == items["absent"]["status"] == "missing"
    assert "pip install 'numpy>=999'" in items["unmet"]["error"]


@pytest.mark.parametrize("variable", ["INVARLOCK_DISABLE_PLUGIN_AUTOLOAD", "INVARLOCK_DEBUG_TRACE"])
def test_switches_are_read_as_what_they_say(invarlock, monkeypatch, variable: str) -> None:
    for value, code in (("true", 0), ("YES", 0), ("off", 0), ("", 0), ("maybe", 2), ("2", 2)):
        monkeypatch.setenv(variable, value)
        done = invarlock("plugins")
        assert done.code == code
        assert (variable in done.err) == (code == 2)


def test_autoload_is_off_for_true_as_for_1(invarlock, site, monkeypatch) -> None:
    site("a-dist", "[invarlock.guards]\na_guard = a_module\n", a_module=guard())
    monkeypatch.setenv("INVARLOCK_DISABLE_PLUGIN_AUTOLOAD", "true")
    assert "a_guard" not in invarlock("plugins").out


@pytest.mark.parametrize(
    ("arguments", "files", "said", "code"),
    [
        (["-p", "odd.py"], {"odd.py": guard()}, "-p odd", 2),
        (["-p", "./odd.py"], {"odd.py": guard()}, "-p odd", 2),
        (["-p", "json"], {}, "of Python itself", 2),
        (["-p", "random"], {"random.py": guard()}, "rename", 2),
        (["-p", "bare"], {"bare.py": "x = 1"}, "no hook implementations", 2),
        (["-p", "odd", "-p", "no:odd"], {"odd.py": guard()}, "blocks it", 0),
        (["-p", "odd"], {"odd.py": "from invarlock.core.api import Guard\nclass G(Guard):\n name = 'invariants'\n def validate(self, model, adapter, context): pass"}, "is taken", 2),
        (["-p", "one", "-p", "two"], dict.fromkeys(("one.py", "two.py"), "from invarlock.core.api import Guard\nclass G(Guard):\n name = 'same'\n def validate(self, model, adapter, context): pass"), "is taken", 2),
    ],
)  # fmt: skip
def test_what_is_not_loaded_as_meant_is_told(invarlock, arguments, files, said: str, code: int) -> None:
    for name, source in files.items():
        Path(name).write_text(source)
    done = invarlock(*arguments, "plugins")
    assert done.code == code
    assert said in done.err
    assert len(done.err.splitlines()) == 1


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "yield", "result = yield", "(yield); return 5", "(yield); raise SystemExit(0)", "(yield); raise ValueError('x')",
        "raise ValueError('x')\n    yield", "return 5\n    yield", "yield; yield; return {'passed': True}",
    ],
)  # fmt: skip
def test_a_wrapper_that_loses_a_result_is_named_and_the_guards_word_stands(invarlock, module, config, body) -> None:
    module(
        "lossy",
        f"from invarlock import hookimpl\n@hookimpl(wrapper=True)\ndef invarlock_validate(guard):\n    {body}\n",
    )
    done = invarlock("run", "-c", config(), "-p", "lossy", "--out", "out")
    assert done.code == 3
    report = read_report(Path("out"))
    assert report["verdict"]["decided_by"] == "hooks lossy"
    assert (report["guards"][0]["action"], report["guards"][0]["error"]) == ("continue", None)


def test_a_wrapper_may_change_a_result_and_catch_an_exception(judged, module) -> None:
    module(
        "changer",
        "from invarlock import hookimpl\n@hookimpl(wrapper=True)\ndef invarlock_validate(guard):\n    try:\n"
        "        result = yield\n    except ZeroDivisionError:\n        result = {'passed': True, 'message': 'caught'}\n"
        "    return {**result, 'action': 'warn'}\n",
    )
    done = judged(guard(validate="1 / 0"), "-p", "changer")
    assert done.code == 0
    assert read_report(Path("out"))["guards"][1]["message"] == "caught"


# -- what was judged is what is saved ----------------------------------------------------------------------------------

MEDDLING = {
    "a hook on a module": "model.model.layers[1].register_forward_hook(lambda *given: None)",
    "a hook before a module": "model.lm_head.register_forward_pre_hook(lambda *given: None)",
    "a hook on all modules": "torch.nn.modules.module.register_module_forward_hook(lambda *given: None)",
    "an attribute": "model.model.norm.variance_epsilon = 10.0",
    "an attribute that was not there": "model.model.scale = 2.0",
    "forward of a module": "model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T",
    "forward of a class": "kind = type(model.model.norm); kept = kind.forward; kind.forward = lambda self, x: kept(self, x)",
    "another module": "model.model.layers[0].mlp.act_fn = torch.nn.ReLU()",
    "the mode": "model.model.train()",
    "gradients": "next(model.parameters()).requires_grad_(not next(model.parameters()).requires_grad)",
    "the configuration": "model.config.rope_parameters = {'rope_type': 'default', 'rope_theta': 5.0}",
    "deep in the configuration": "model.config.rope_parameters['rope_theta'] = 5.0",
    "the generation configuration": "model.generation_config.eos_token_id = 9",
    "a weight": "next(model.parameters()).data.mul_(3)",
    "a buffer": "next(model.buffers()).mul_(2)",
    "a tie": "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())",
    "a data type": "model.model.norm.half()",
    "the class of a module": "model.lm_head.__class__ = type('Odd', (torch.nn.Linear,), {})",
    "a descriptor on a class": "type(model.model.norm).variance_epsilon = property(lambda self: 10.0)",
    "a method of a configuration's class": "type(model.config).to_dict = lambda self: {}",
    "a function that models call": "torch.nn.functional.silu = torch.nn.functional.relu",
    "the tokenizer's methods": (
        "import gc; from transformers import PreTrainedTokenizerBase as Base; "
        "[setattr(found, 'save_pretrained', print) for found in gc.get_objects() if type(found).__mro__.count(Base)]"
    ),
    "the tokenizer": (
        "import gc; from transformers import PreTrainedTokenizerBase as Base; "
        "[found.add_tokens(['evil']) for found in gc.get_objects() if type(found).__mro__.count(Base)]"
    ),
}


@pytest.mark.parametrize(
    ("hook", "what"),
    [
        *(("validate", what) for what in MEDDLING),
        *(
            (hook, what)
            for hook in ("observe", "prepare")
            for what in ("a hook on a module", "a weight", "the tokenizer")
        ),
    ],
)
def test_what_a_guard_changes_in_its_turn_is_undone_and_named(judged, hook: str, what: str) -> None:
    returned = {"observe": "{}", "prepare": "{'ready': True}", "validate": OK}[hook]
    done = judged(guard(**{hook: f"{MEDDLING[what]}; return {returned}"}))
    assert done.code == 3, done.err
    report = read_report(Path("out"))
    assert report["verdict"]["decided_by"] == "guard odd"
    assert "changed the model" in report["guards"][1]["message"]
    assert report["model"]["restored"] is True
    assert [report["guards"][place]["error"] for place in (0, 2)] == [None, None]
    assert "model" not in saved()


@pytest.mark.parametrize(
    ("hook", "what"),
    [
        ("attempt_finished", "a weight"),
        ("report_sections", "a hook on a module"),
        ("run_finished", "the tokenizer"),
        ("run_finished", "the generation configuration"),
    ],
)
def test_a_change_after_the_last_turn_is_exit_3_and_nothing_is_saved(judged, hook: str, what: str) -> None:
    late = guard(validate=f"global model_; model_ = model; return {OK}", **{hook: f"model = model_; {MEDDLING[what]}"})
    done = judged(late)
    assert done.code == 3
    assert "odd: the model changed after it had been judged" in done.err
    assert not {"model", "report.json"} & set(saved())


def test_a_forged_pass_is_found(judged) -> None:
    """The baseline's outputs kept, and given again in the place of the edited model's."""
    source = guard(
        observe="first = not kept; model.lm_head.register_forward_hook(lambda m, a, o: kept.append(o) if first else kept.pop(0)); return {}"
    )
    done = judged("kept = []\n" + source, "--set", "edit.plan.bitwidth=2")
    assert done.code == 3
    assert "lm_head._forward_hooks" in read_report(Path("out"))["guards"][1]["message"]


def test_a_tap_that_changes_the_model_is_found(judged) -> None:
    tap = "class Tap:\n def __call__(self, module, *given): module.weight.data.mul_(2)\n def result(self): pass\n"
    done = judged(tap + guard(observe="return {'lm_head': Tap()}"))
    assert done.code == 3
    assert "taps of odd: the model changed in the baseline pass" in done.err


@pytest.mark.parametrize("what", ["a hook on a module", "the configuration", "a weight"])
def test_a_subject_is_brought_back_for_the_next_guard(invarlock, module, what: str) -> None:
    module("odd", guard(validate=f"{MEDDLING[what]}; return {OK}"))
    module(
        "witness",
        guard(validate="return {'passed': True, 'metrics': {'sum': float(next(model.parameters()).detach().sum())}}"),
    )
    done = invarlock(
        "compare", "--baseline", DEMO / "checkpoint", "--subject", DEMO / "checkpoint", "-p", "odd", "-p", "witness", "--out", "out",
        "--set", "guards.order=[witness, odd, witness]", "--set", "dataset.final_n=4", "--set", "dataset.seq_len=32",
    )  # fmt: skip
    assert done.code == 3
    first, odd, last = read_report(Path("out"))["guards"]
    assert "changed the model" in odd["message"]
    assert first["metrics"] == last["metrics"]


def test_a_change_of_the_input_is_told(invarlock, module, config, tmp_path) -> None:
    shutil.copytree(DEMO / "checkpoint", "checkpoint")
    module("odd", guard(prepare="open('checkpoint/more.txt', 'w').close(); return {'ready': True}"))
    path = config(model={"id": "checkpoint", "device": "cpu"}, guards={"order": ["odd"]})
    done = invarlock("run", "-c", path, "-p", "odd", "--out", "out")
    assert done.code == 0
    assert "more.txt appeared" in done.err
    assert "more.txt appeared" in " ".join(read_report(Path("out"))["verdict"]["reasons"])


def test_check_guard_finds_what_compares_a_model_with_itself(monkeypatch) -> None:
    from invarlock.core.api import Guard

    monkeypatch.setattr(checking, "ARCHITECTURES", ["llama"])

    class Blind(Guard):
        def prepare(self, model, adapter, calib, policy):
            self.before = dict(model.named_parameters())
            return {"ready": True}

        def validate(self, model, adapter, context):
            return {"passed": all(self.before[name].equal(now) for name, now in model.named_parameters())}

    class Seeing(Blind):
        def prepare(self, model, adapter, calib, policy):
            self.before = {name: parameter.detach().nan_to_num() for name, parameter in model.named_parameters()}
            return {"ready": True}

        def validate(self, model, adapter, context):
            return {"passed": True}

    with pytest.raises(AssertionError, match=r"keeps live weights from prepare \(self\.before\["):
        check_guard(Blind)
    check_guard(Seeing)


# -- a report that nobody rewrites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["attempt_finished", "run_finished", "report_sections"])
def test_a_plugin_cannot_rewrite_the_verdict(judged, hook: str) -> None:
    rewrite = "report['verdict'].update(action='continue', accepted=True, exit_code=0); report['guards'].clear()"
    done = judged(guard(validate="return {'passed': False, 'action': 'abort'}", **{hook: rewrite}))
    assert done.code == 1
    report = read_report(Path("out"))
    assert (report["verdict"]["action"], report["verdict"]["exit_code"]) == ("abort", 1)
    assert len(report["guards"]) == 3


def test_what_run_finished_returns_goes_below_extra(judged) -> None:
    assert judged(guard(run_finished="report['extra']['a'] = 1; return {'b': [2]}"), save=False).code == 0
    assert read_report(Path("out"))["extra"] == {"a": 1, "b": [2]}


def test_a_guard_cannot_change_what_the_next_one_sees(judged) -> None:
    source = guard(validate=f"context['edit']['modules'].clear(); context['policy']['x'] = 1; return {OK}")
    module_twice = source.replace("context['edit']", "assert context['edit']['modules']; context['edit']", 1)
    assert judged(module_twice, "--set", "guards.order=[odd, odd]", save=False).code == 0
    assert "x" not in read_report(Path("out"))["config"]["guards"]


def test_an_option_of_a_wrong_type_is_told_before_anything_is_loaded(invarlock, config) -> None:
    path = config(model={"id": "nowhere"}, guards={"order": ["hello_guard"], "hello_guard": {"threshold": "high"}})
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2
    assert "guards.hello_guard.threshold: 'high'" in done.err


# -- the process -------------------------------------------------------------------------------------------------------


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = f'set -o pipefail; invarlock() {{ {sys.executable} -m invarlock "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", command], env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip


WORDY = guard(validate=f"print('✓' * 9999); return {OK}")


@pytest.fixture
def line(config, module):
    """A run as a line of a shell, under a guard of this source."""

    def write(source: str = WORDY) -> str:
        module("odd", source)
        return f"invarlock run -c {config(guards={'order': ['odd']})} -p odd --out out"

    return write


@pytest.fixture
def ended(line, forking):
    """Such a run in a process of its own, after its end."""

    def run(source: str, *options: str, program: str = "") -> Forked:
        _, *arguments = line(source).split()
        process = forking.start(*arguments, *options, program=program)
        process.wait()
        return process

    return run


def test_a_full_standard_output_changes_no_verdict(ended) -> None:
    assert ended(WORDY, program="os.dup2(os.open('/dev/full', os.O_WRONLY), 1)").code == 0
    assert read_report(Path("out"))["verdict"]["exit_code"] == 0


@pytest.mark.parametrize("redirection", slow("> /dev/full", ">&-", "| true", "2> /dev/full", "<&- >&- 2>&-"))
def test_output_that_cannot_be_written_changes_no_verdict(line, redirection: str) -> None:
    assert shell(f"{line()} {redirection}").returncode == 0
    assert read_report(Path("out"))["verdict"]["exit_code"] == 0


def test_glyphs_that_a_terminal_lacks_are_replaced(line) -> None:
    done = shell(f"{line()} && invarlock plugins", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "? Ready" in done.stdout


def test_a_listing_that_cannot_be_written_is_no_success() -> None:
    done = shell("invarlock config > /dev/full")
    assert done.returncode == 2
    assert "standard output: No space left on device" in done.stderr


def test_json_stays_one_object_whatever_is_written_to_the_descriptor(ended) -> None:
    noise = (
        "import os, subprocess; os.write(1, b'noise'); subprocess.run(['echo', 'noise']); print('noise'); return " + OK
    )
    out, err = ended(guard(validate=noise), "--json").said()
    assert json.loads(out)["verdict"]["accepted"] is True
    assert err.count("noise") == 3


def test_a_thread_or_process_left_behind_does_not_keep_the_command_alive(ended) -> None:
    left = (
        "import threading, time, subprocess, multiprocessing; threading.Thread(target=time.sleep, args=(999,)).start(); "
        "subprocess.Popen(['sleep', '999']); multiprocessing.Process(target=time.sleep, args=(999,)).start(); return "
    )
    done = ended(guard(validate=left + "{'passed': False, 'action': 'abort'}"))
    assert done.code == 1, done.said()


def test_what_is_printed_at_import_is_not_the_commands_output(module) -> None:
    module("loud", f"print('loud'); import os; os.write(1, b'loud')\n{guard().removeprefix('import torch')}")
    done = shell("invarlock -p loud plugins --json")
    assert json.loads(done.stdout)["format_version"] == "plugins-v1"
    assert done.stderr.count("loud") == 2
    assert shell("invarlock -p loud config --schema").stdout.startswith("{")


def test_a_closed_standard_output_silences_no_verdict(ended) -> None:
    done = ended(guard(validate=f"import sys; sys.stdout.close(); return {OK}"))
    assert done.code == 0
    assert done.said()[0].startswith("ACCEPTED")


def test_a_guard_that_changes_the_working_folder_changes_no_path(judged) -> None:
    assert judged(guard(prepare="import os; os.chdir('/'); return {'ready': True}")).code == 0
    assert "report.json" in saved()


@pytest.mark.parametrize(
    "source",
    [
        "from invarlock.core.api import Guard\nclass G(Guard):\n name = property(lambda self: 'x')\n def validate(self, model, adapter, context): pass",
        "from invarlock import hookimpl\nclass A:\n def __eq__(self, other): raise ValueError\n @hookimpl\n def invarlock_validate(self): pass\nG = A()",
    ],
)
def test_odd_objects_are_listed(invarlock, site, source: str) -> None:
    site("odd-dist", "[invarlock.guards]\nodd = odd_module:G\nworse = !\n", odd_module=source)
    done = invarlock("plugins", "guards", "--json")
    assert done.code == 0, done.err
    assert {item["name"]: item["status"] for item in json.loads(done.out)["items"]}["worse"] == "error"


def test_a_tap_that_hooks_on_while_it_looks_is_found(judged) -> None:
    """Its hook takes itself off in the final windows, so that nothing is left of it after the pass."""
    tap = (
        "class Tap:\n def __call__(self, module, *given):\n"
        "  handles.append(module.register_forward_hook(lambda *given: handles.pop().remove()))\n def result(self): pass\n"
    )
    done = judged("handles = []\n" + tap + guard(observe="return {'lm_head': Tap()}"), "--set", "edit.plan.bitwidth=2")
    assert done.code == 3
    assert "taps of odd" in done.err


def test_what_is_streamed_is_edited_as_the_plan_says(judged) -> None:
    """The edit of a streamed model cannot be taken off for a pass, nor changed for the next guard."""
    for source in (
        guard(observe="model.streaming.edit = None; return {}"),
        guard(validate=f"model.streaming.edit = lambda name, weight: weight * 0; return {OK}"),
    ):
        done = judged(source, "--stream", "--set", "edit.plan.bitwidth=3")
        assert done.code == 3, done.out
        report = read_report(Path("out"))
        assert "streaming.edit" in report["guards"][1]["message"]
        assert report["guards"][2]["error"] is None
        shutil.rmtree("out")
        sys.modules.pop("odd")


@pytest.mark.parametrize("key", ["output_hidden_states", "output_attentions"])
def test_a_model_that_is_asked_for_hidden_states_accuses_nobody(invarlock, module, config, key: str) -> None:
    shutil.copytree(DEMO / "checkpoint", "checkpoint")
    described = json.loads(Path("checkpoint/config.json").read_text())
    Path("checkpoint/config.json").write_text(json.dumps({**described, key: True}))
    asking = "ids = next(iter(calib))['input_ids']; model(ids, output_hidden_states=True); return {'ready': True}"
    module("odd", guard(prepare=asking))
    path = config(model={"id": "checkpoint", "device": "cpu"}, guards={"order": ["invariants", "odd"]})
    done = invarlock("run", "-c", path, "-p", "odd", "--out", "out")
    assert done.code == 0, done.out + done.err


def test_what_a_saliency_guard_leaves_behind_is_no_change(judged) -> None:
    gradients = (
        "h = [m.register_full_backward_hook(lambda *g: None) for m in model.modules() if type(m) is torch.nn.Linear]; model(next(iter(calib))['input_ids']); "
        "[one.remove() for one in h]; return {'ready': True}"
    )
    assert judged(guard(prepare=gradients)).code == 0


def test_a_guard_cannot_change_the_windows_or_another_guards_context(judged) -> None:
    source = guard(
        prepare="w = calib.windows.input_ids; (w if w._base is None else w._base).zero_(); return {'ready': True}",
        validate="assert context['edited']['ratio'] != 0.5; context['edited']['ratio'] = 0.5; adapter.name = 'evil'; return "
        + OK,
    )
    assert judged(source, "--set", "guards.order=[odd, odd]", save=False).code == 0
    report = read_report(Path("out"))
    assert report["model"]["adapter"] == "hf_causal"
    assert report["metrics"]["primary"]["baseline"] < 20


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.stdout = None",
        *slow("import atexit, os; atexit.register(os._exit, 1)"),
        "import os, sys\n    child = os.fork()\n    if child == 0: sys.exit(0)\n    os.waitpid(child, 0)",
        *slow(
            "import atexit, time; atexit.register(time.sleep, 999)",
            "import sys; sys.stdout = type('Tee', (), {'write': lambda self, text: None})()",
            "import threading\n    def work():\n        while True: print('x')\n    threading.Thread(target=work, daemon=True).start()",
        ),
    ],
)  # fmt: skip
def test_the_status_is_the_verdicts_whatever_a_plugin_leaves(ended, body: str) -> None:
    done = ended(guard(validate=f"{body}\n    return {OK}"))
    assert done.code == 0, done.said()
    assert done.said()[0].count("ACCEPTED") == 1


def test_an_exception_that_cannot_be_printed_is_the_guards_error(judged) -> None:
    hostile = "class Odd(Exception):\n def __str__(self): raise SystemExit(0)\n"
    done = judged(hostile + guard(validate="raise Odd()"))
    assert done.code == 3
    assert "Odd: its message raises SystemExit" in read_report(Path("out"))["guards"][1]["message"]


@pytest.mark.parametrize(
    "setting",
    ["torch.set_default_device('meta')", "torch.set_default_dtype(torch.float64)", "torch.set_grad_enabled(False)"],
)  # fmt: skip
def test_settings_of_the_process_do_not_outlast_a_turn(judged, setting: str) -> None:
    for_the_first = guard(validate=f"{setting}; return {OK}")
    assert judged(for_the_first).code == 0


TAPPING = "class Tap:\n def __call__(self, module, *given): pass\n def result(self): pass\n" + guard(
    observe="return {'lm_head': Tap()}"
)


@pytest.mark.parametrize(
    ("command", "order"),
    [
        ("run", ["invariants", "reconstruction"]),
        ("run", ["odd"]),
        ("run --stream", ["odd"]),
        ("compare --baseline checkpoint --subject checkpoint", ["odd"]),
    ],
)
def test_positions_that_a_model_scales_as_it_runs_accuse_nobody(
    invarlock, module, config, command: str, order: list[str]
) -> None:
    shutil.copytree(DEMO / "checkpoint", "checkpoint")
    described = json.loads(Path("checkpoint/config.json").read_text())
    half = described["hidden_size"] // described["num_attention_heads"] // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * half, "long_factor": [1.5] * half}
    described |= {"max_position_embeddings": 128, "rope_parameters": rope}
    Path("checkpoint/config.json").write_text(json.dumps(described))
    module("odd", TAPPING)
    dataset = {"provider": "demo", "seq_len": 64, "preview_n": 1, "final_n": 2}
    path = config(model={"id": "checkpoint", "device": "cpu"}, dataset=dataset, guards={"order": order})
    done = invarlock(*command.split(), "-c", path, "-p", "odd", "--out", "out")
    assert done.code in (0, 1), done.err
    assert all(found["error"] is None for found in read_report(Path("out"))["guards"])
