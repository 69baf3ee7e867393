"""Plugins: found, named, blocked, listed, and what is said when one is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from invarlock.core.errors import PluginError
from invarlock.plugins.catalog import Catalog, Selection
from invarlock.plugins.manager import PluginManager
from invarlock.plugins.plugin import Kind, Status

GUARD = """
from invarlock.core.api import Guard

class {name}(Guard):
    name = "{name}"

    def __init__(self, strict: bool = True, limit: float = 1.0):
        self.strict = strict

    def validate(self, model, adapter, context):
        return {{"passed": True, "action": "continue", "message": f"strict is {{self.strict}}"}}
"""
ENTRY = "[invarlock.guards]\n{} = {}\n"


def listing(invarlock, *arguments: str) -> dict[tuple[str, str], dict]:
    done = invarlock("plugins", *arguments, "--json")
    assert done.code == 0
    return {(item["kind"], item["name"]): item for item in json.loads(done.out)["items"]}


# -- listing -----------------------------------------------------------------------------------------------------------


def test_built_ins_are_found_through_their_entry_points_and_ready(invarlock) -> None:
    items = listing(invarlock)
    for name in ("hf_causal", "hf_mlm", "hf_seq2seq", "hf_gguf", "hf_auto"):
        assert items["adapter", name]["status"] == "ready"
        assert items["adapter", name]["origin"] == "builtin"
        assert items["adapter", name]["entry_point"].startswith("invarlock.adapters: ")
    assert items["guard", "invariants"]["hooks"] == ["invarlock_observe", "invarlock_prepare", "invarlock_validate"]
    assert items["edit", "quant_rtn"]["module"] == "invarlock.quantization"


def test_json_is_sorted_by_kind_and_name_and_names_its_category(invarlock) -> None:
    listed = json.loads(invarlock("plugins", "list", "--json").out)
    order = [(item["kind"], item["name"]) for item in listed["items"]]
    assert order == sorted(order)
    assert (listed["format_version"], listed["category"]) == ("plugins-v1", "all")
    assert json.loads(invarlock("plugins", "guards", "--json").out)["category"] == "guards"


def test_a_name_is_never_cut_however_narrow_the_terminal(invarlock, site, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a_guard_with_a_name_that_is_far_longer_than_a_column_of_a_table_usually_is_in_a_terminal_of_forty"
    site("long-plugin", ENTRY.format(name, "long_guard:G"), long_guard=GUARD.format(name="G"))
    monkeypatch.setenv("COLUMNS", "40")
    assert name in invarlock("plugins", "guards").out


@pytest.mark.parametrize(("category", "kind"), [("adapters", "Adapter"), ("guards", "Guard"), ("edits", "Edit")])
def test_a_category_lists_its_kind_alone(invarlock, category: str, kind: str) -> None:
    rows = invarlock("plugins", category).out.splitlines()[1:]
    assert rows
    assert all(row.split(" | ")[2].strip() == kind for row in rows)


def test_only_filters_by_status_and_origin(invarlock, site) -> None:
    site("broken", ENTRY.format("broken", "no_such_module:G"))
    assert set(listing(invarlock, "--only", "error")) == {("guard", "broken")}
    assert set(listing(invarlock, "--only", "plugin")) == {("guard", "broken")}
    assert ("guard", "broken") not in listing(invarlock, "--only", "ready")
    assert ("guard", "invariants") in listing(invarlock, "--only", "builtin")


@pytest.mark.parametrize(
    ("category", "name", "said"),
    [("guards", "hello_guard", "threshold: 'float' = 1.0"), ("adapters", "hf_causal", "plugins_builtin.adapters.hf"), ("edits", "quant_rtn", "invarlock.quantization")],
)  # fmt: skip
def test_explain_works_for_every_kind(invarlock, category: str, name: str, said: str) -> None:
    done = invarlock("plugins", category, "--explain", name)
    assert done.code == 0
    assert said in done.out


def test_explain_of_an_unknown_name_suggests_the_nearest(invarlock) -> None:
    done = invarlock("plugins", "--explain", "invarients")
    assert done.code == 2
    assert "'invariants'" in done.err


# -- broken plugins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("raise RuntimeError('at import')", "at import"),
        ("class Other: pass", "no attribute 'G'"),
        ("class G: pass", "not derived from invarlock.core.api.Guard"),
        ("from invarlock.core.api import Guard\nclass G(Guard): pass", "validate"),
        ("from invarlock.core.api import Guard\nclass G(Guard):\n def __init__(self, x): pass\n def validate(self, model, adapter, context): pass", "'x'"),
        ("from invarlock.core.api import Guard\nclass G(Guard):\n requires=('no-such-thing',)\n def validate(self, model, adapter, context): pass", "pip install no-such-thing"),
        ("from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_validat(self, model): pass\nG = A()", "'invarlock_validate'"),
        ("from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_validate(self, modle): pass\nG = A()", "'model'"),
        ("from invarlock import hookimpl\nclass A:\n @hookimpl\n def invarlock_validate(self, model=None): pass\nG = A()", "default"),
        ("class A:\n def invarlock_validate(self, model): pass\nG = A()", "@invarlock.hookimpl"),
        ("class A: pass\nG = A()", "implements no hook"),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_listed_with_its_error_and_hurts_nobody(invarlock, site, source: str, said: str) -> None:
    site("broken", ENTRY.format("broken", "broken_guard:G"), broken_guard=source)
    items = listing(invarlock)
    assert items["guard", "broken"]["status"] in ("error", "missing")
    assert said in items["guard", "broken"]["error"]
    assert items["guard", "invariants"]["status"] == "ready"


def test_a_missing_requirement_has_a_status_of_its_own(invarlock, site) -> None:
    source = GUARD.format(name="G").replace("name =", "requires = ('no-such-thing',)\n    name =")
    site("needy", ENTRY.format("needy", "needy_guard:G"), needy_guard=source)
    assert listing(invarlock, "--only", "missing").keys() == {("guard", "needy")}


def test_a_broken_plugin_asked_for_by_name_is_a_usage_error(invarlock, site, config) -> None:
    site("broken", ENTRY.format("broken", "no_such_module:G"))
    done = invarlock("run", "-c", config(guards={"order": ["broken"]}), "--out", "out")
    assert done.code == 2
    assert "no_such_module" in done.err
    assert "Traceback" not in done.err


def test_a_broken_plugin_can_always_be_turned_off(invarlock, site) -> None:
    site("evil", ENTRY.format("evil", "evil_guard:G"), evil_guard="open('imported', 'w')\nraise SystemExit(9)")
    items = listing(invarlock, "-p", "no:evil")
    assert items["guard", "evil"]["status"] == "blocked"
    assert not Path("imported").exists()


def test_two_distributions_with_one_name_are_both_named(invarlock, site) -> None:
    site("first-dist", ENTRY.format("twin", "twin_guard:G"), twin_guard=GUARD.format(name="G"))
    site("second-dist", ENTRY.format("twin", "twin_guard:G"), version="2.0")
    error = listing(invarlock)["guard", "twin"]["error"]
    assert "first-dist 1.0" in error
    assert "second-dist 2.0" in error


def test_a_built_in_keeps_its_name(invarlock, site) -> None:
    site("thief", ENTRY.format("invariants", "thief_guard:G"), thief_guard=GUARD.format(name="G"))
    catalog = Catalog.discover(Selection())
    statuses = {plugin.distribution: plugin.status for plugin in catalog.named("invariants")}
    assert statuses == {"invarlock": Status.READY, "thief": Status.ERROR}


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_a_guard_and_an_adapter_may_share_a_name_and_a_module(invarlock, site) -> None:
    source = (
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_load_model(model_id): return None\n"
        "@hookimpl\ndef invarlock_validate(model): return {'passed': True}\n"
    )
    site(
        "both", "[invarlock.guards]\nboth = both_module\n[invarlock.adapters]\nboth = both_module\n", both_module=source
    )
    items = listing(invarlock)
    assert items["guard", "both"]["status"] == items["adapter", "both"]["status"] == "ready"


def test_autoload_off_loads_built_ins_and_what_is_named_only(invarlock, site, monkeypatch) -> None:
    site("a-plugin", ENTRY.format("guard_a", "guard_a:G"), guard_a=GUARD.format(name="G"))
    site("b-plugin", ENTRY.format("guard_b", "guard_b:G"), guard_b=GUARD.format(name="G"))
    monkeypatch.setenv("INVARLOCK_DISABLE_PLUGIN_AUTOLOAD", "1")
    items = listing(invarlock, "-p", "guard_a")
    assert ("guard", "guard_a") in items
    assert ("guard", "guard_b") not in items
    assert ("guard", "invariants") in items


def test_a_local_module_is_loaded_wherever_the_option_stands(invarlock, module) -> None:
    module("local_guards", GUARD.format(name="local_one"))
    for arguments in (("-p", "local_guards", "plugins", "--json"), ("plugins", "--json", "-plocal_guards")):
        items = {item["name"]: item for item in json.loads(invarlock(*arguments).out)["items"]}
        assert items["local_one"]["origin"] == "local"


@pytest.mark.parametrize(
    ("argument", "said"),
    [("no_such_mod", "no_such_mod"), ("invarients", "'invariants'"), ("no:invarients", "'invariants'")],
)
def test_a_name_that_is_not_there_is_a_usage_error(invarlock, argument: str, said: str) -> None:
    done = invarlock("plugins", "-p", argument)
    assert done.code == 2
    assert said in done.err


def test_a_local_module_that_does_not_import_says_why(invarlock, module) -> None:
    module("needs_more", "import a_module_that_is_not_there")
    done = invarlock("plugins", "-p", "needs_more")
    assert done.code == 2
    assert "a_module_that_is_not_there" in done.err


def test_a_plugin_adds_a_command(invarlock, module) -> None:
    module(
        "hello_command",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_add_commands(subparsers):\n"
        "    subparsers.add_parser('hello', help='say hello').set_defaults(run=lambda args: print('hello') or 0)\n",
    )
    assert invarlock("-p", "hello_command", "hello").out == "hello\n"
    assert "say hello" in invarlock("-p", "hello_command", "--help").out


def test_a_plugin_that_fails_to_add_a_command_is_named_and_the_others_are_there(invarlock, module) -> None:
    module(
        "bad_command", "from invarlock import hookimpl\n@hookimpl\ndef invarlock_add_commands(subparsers):\n    1 / 0\n"
    )
    done = invarlock("-p", "bad_command", "plugins")
    assert done.code == 0
    assert "bad_command" in done.err
    assert "ZeroDivisionError" in done.err


# -- tracing -----------------------------------------------------------------------------------------------------------


def test_the_trace_goes_to_stderr_and_leaves_stdout_as_it_was(invarlock, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = invarlock("plugins", "list", "--json")
    monkeypatch.setenv("INVARLOCK_DEBUG_TRACE", "1")
    loud = invarlock("plugins", "list", "--json")
    assert loud.out == quiet.out
    assert "invariants" in loud.err
    assert "hook invarlock_add_commands" in loud.err or "plugin invariants" in loud.err


def test_kinds_are_what_the_listing_promises() -> None:
    assert {kind.value for kind in Kind} == {
        "adapter", "edit", "guard", "hooks", "provider", "exporter", "report format", "command", "task",
    }  # fmt: skip


# -- what plugins bring besides themselves -----------------------------------------------------------------------------


def test_everything_that_a_plugin_brings_is_listed_with_its_origin(invarlock, module) -> None:
    module(
        "brings",
        "from invarlock import hookimpl\nclass Named:\n def __init__(self, name): self.name = name\n"
        "@hookimpl\ndef invarlock_documents(dataset): pass\n"
        "@hookimpl\ndef invarlock_exporters(): return [Named('e1'), Named('e2')]\n"
        "@hookimpl\ndef invarlock_report_formats(): return (Named('f'),)\n"
        "@hookimpl\ndef invarlock_add_commands(subparsers): subparsers.add_parser('c')\n",
    )
    items = listing(invarlock, "-p", "brings")
    local = {key for key, item in items.items() if item["origin"] == "local"}
    brought = {("provider", "brings"), ("exporter", "e1"), ("exporter", "e2"), ("report format", "f"), ("command", "c")}
    assert local == brought
    assert {("provider", "hf"), ("command", "run"), ("edit", "quant_rtn")} <= items.keys()
    assert items["command", "run"]["entry_point"] == "invarlock.hooks: run = invarlock.cli.commands.run"
    for category, names in (("exporters", ["e1", "e2"]), ("report-formats", ["f"]), ("commands", ["c"])):
        assert set(names) <= {name for _, name in listing(invarlock, category, "-p", "brings")}


@pytest.mark.parametrize("hook", ["exporters", "report_formats"])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("5", "returned int, not a list"), ("[5]", "int is no "), ("[type('N', (), {'name': ''})()]", "not a text"),
        ("[type('N', (), {'name': 'x'})()] * 2", "'x' is taken"), ("1 / 0", "ZeroDivisionError"),
        ("(_ for _ in ()).throw(SystemExit(0))", "SystemExit"),
    ],
)  # fmt: skip
def test_what_is_brought_wrongly_is_the_plugins_failure(invarlock, module, hook: str, returned: str, said: str) -> None:
    module("wrong", f"from invarlock import hookimpl\n@hookimpl\ndef invarlock_{hook}(): return {returned}\n")
    manager = PluginManager.load(Selection.of(["wrong"], autoload=False))
    with pytest.raises(PluginError, match="hooks wrong: ") as caught:
        getattr(manager, hook)()
    assert said in str(caught.value)
    done = invarlock("plugins", "-p", "wrong")
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert said in done.err and "invariants" in done.out


@pytest.mark.parametrize("name", ["report", "demo"])
def test_a_local_guard_may_have_the_name_of_a_built_in_module_of_hooks(invarlock, module, name: str) -> None:
    module(name, GUARD.format(name="local_one"))
    assert listing(invarlock, "-p", name)["guard", "local_one"]["origin"] == "local"


def test_a_command_that_is_there_keeps_its_name(invarlock, module) -> None:
    module(
        "thief",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_add_commands(subparsers):\n"
        "    subparsers.add_parser('config').set_defaults(run=lambda args: 1)\n",
    )
    done = invarlock("-p", "thief", "config")
    assert done.code == 0
    assert "hooks thief: invarlock_add_commands" in done.err


ONE_WORD = (
    "from invarlock import hookimpl\n"
    "class Word:\n name, suffix = 'word', '.word'\n"
    " def render(self, runs): return ' '.join(run.report.verdict.action for run in runs)\n"
    "@hookimpl\ndef invarlock_report_formats(): return [Word()]\n"
)


def test_a_plugin_brings_a_report_format(invarlock, module) -> None:
    module("words", ONE_WORD)
    assert invarlock("run", "--demo", "--out", "out").code == 0
    assert invarlock("report", "-p", "words", "out", "--format", "word").out == "continue"
    assert invarlock("report", "-p", "words", "out", "-o", "verdict.word").code == 0
    assert Path("verdict.word").read_text() == "continue"
    assert "did you mean 'word'?" in invarlock("report", "-p", "words", "out", "--format", "wort").err


@pytest.mark.parametrize("body", ["raise ValueError('x')", "raise SystemExit(0)", "return 5"])
def test_a_report_format_that_fails_is_its_plugins_failure(invarlock, module, body: str) -> None:
    module("words", ONE_WORD.replace("return ' '.join(run.report.verdict.action for run in runs)", body))
    assert invarlock("run", "--demo", "--out", "out").code == 0
    done = invarlock("report", "-p", "words", "out", "--format", "word")
    assert done.code == 3, done.out
    assert "word" in done.err
    assert invarlock("report", "-p", "words", "out").code == 0
