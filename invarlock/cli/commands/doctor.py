"""``invarlock doctor``: what stands in the way of a run?"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli import streams
from invarlock.cli.options import (
    add_setting_option,
    path_argument,
    quieten_libraries,
    set_environment,
    stdout_for_json_alone,
)
from invarlock.core.errors import ExitCode, UsageError, one_line

if TYPE_CHECKING:
    from invarlock.doctor.findings import Check

DESCRIPTION = """\
Loads and constructs every plugin, checks versions and devices, and, of a configuration, its guards, its output folder,
the memory and the disk that its model needs, the checkpoint, the weights that the plan selects, its text against the
windows asked for, and access to a hub. No weights are loaded."""

EPILOG = """\
examples:
  invarlock doctor
  invarlock doctor -c config.yaml
  invarlock doctor -c config.yaml --json

exit status:
  0  there is no problem
  1  there is a problem: a line says what to do
  2  wrong usage or configuration"""


OF_CONFIG = ("guards", "output", "memory", "disk", "model", "edit", "text", "hub")


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor", help="find out what stands in the way of a run", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "-c", "--config", type=path_argument, metavar="CONFIG", help="check what this configuration asks for, too"
    )
    add_setting_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, format doctor-v1")
    parser.add_argument("--allow-network", action="store_true", help="ask the hub for a model that is not here")
    parser.set_defaults(run=run, quiet=True, judges=True)


def run(args: argparse.Namespace) -> int:
    set_environment(args)
    from invarlock.doctor.findings import Outcome

    with stdout_for_json_alone(args):
        findings = list(_findings(args))
    problem = any(finding.status is Outcome.PROBLEM for finding in findings)
    items = [dataclasses.asdict(finding) for finding in findings]
    if args.json:
        whole = {"format_version": "doctor-v1", "problem": problem, "findings": items}
        print(json.dumps(whole, indent=2), file=streams.result())
    else:
        print("\n".join(_lines(findings)))
    return ExitCode.REJECTED if problem else ExitCode.ACCEPTED


def _findings(args: argparse.Namespace) -> Iterator[Check]:
    from invarlock.doctor import installation
    from invarlock.doctor.findings import Check, Outcome

    versions = list(installation.versions())
    yield from versions
    lacking = any(finding.status is Outcome.PROBLEM for finding in versions)
    configured = args.config is not None or args.settings
    if configured and not lacking:
        yield from _findings_of_config(args)
        return
    yield from installation.plugins(args.manager.catalog)
    yield from installation.devices("auto")
    why, todo = ("there is no configuration", "give one with -c CONFIG")
    if configured:
        why, todo = "a requirement is not met", "install what is required first"
    yield from (Check(Outcome.NOT_CHECKED, subject, why, todo) for subject in OF_CONFIG)


def _findings_of_config(args: argparse.Namespace) -> Iterator[Check]:
    # Only here: these import all that is required.
    from invarlock.config.loading import load
    from invarlock.doctor import inputs, installation
    from invarlock.doctor.findings import Check, Outcome

    config = load(args.config, args.settings)
    try:
        args.manager.add(config.plugins, args.selection.blocked)
    except UsageError as error:
        yield Check(Outcome.PROBLEM, "plugins", one_line(error), "correct the module, or take it out of plugins")
    yield from installation.plugins(args.manager.catalog)
    yield from installation.devices(config.model.device)
    quieten_libraries(verbose=False)
    yield from inputs.guards(config, args.manager)
    yield from inputs.output(config)
    yield from inputs.space(config)
    yield from inputs.model(config, args.manager)
    yield from inputs.hub(config, allow_network=args.allow_network)


def _lines(findings: list[Check]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.status:<13}{finding.subject:<10}{finding.what}"
        if finding.todo:
            yield f"{'':<23}-> {finding.todo}"
