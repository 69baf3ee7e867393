"""The plugins, the versions and the devices of this installation; imports torch only where it is looked at."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from invarlock.core.errors import one_line
from invarlock.doctor.findings import Check, Outcome
from invarlock.plugins.catalog import Catalog
from invarlock.plugins.plugin import OWN_DISTRIBUTION, Plugin, Status

NAMED = ("torch", "transformers")
"""Distributions whose versions a reader of the findings needs."""


def plugins(found: Catalog) -> Iterator[Check]:
    """Each plugin that cannot be used and why; how many can."""
    ready = [plugin for plugin in found.plugins if plugin.status is Status.READY]
    yield Check(Outcome.OK, "plugins", f"{len(ready)} are ready")
    for plugin in found.plugins:
        if plugin not in ready:
            yield _unready(plugin)


def _unready(plugin: Plugin) -> Check:
    what = f"{plugin.label}: {plugin.error}"
    if plugin.options_missing:
        return Check(Outcome.OK, "plugins", what, f"give its options as guards.{plugin.name}.OPTION")
    if plugin.status is Status.BLOCKED:
        return Check(Outcome.NOT_CHECKED, "plugins", what)
    if plugin.status is Status.MISSING:
        return Check(Outcome.WARNING, "plugins", what, "install it if you need the plugin")
    who = f"{plugin.distribution} {plugin.version}" if plugin.distribution else plugin.module
    return Check(Outcome.PROBLEM, "plugins", what, f"update or remove {who}, or turn it off: -p no:{plugin.name}")


def versions() -> Iterator[Check]:
    """Python and every distribution that is required, against what this package asks for."""
    try:
        own = importlib.metadata.metadata(OWN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Check(Outcome.NOT_CHECKED, "versions", "invarlock is not installed as a distribution", "pip install .")
        return
    if platform.python_version() not in SpecifierSet(own["Requires-Python"]):
        what = f"Python {platform.python_version()} is not {own['Requires-Python']}"
        yield Check(Outcome.PROBLEM, "versions", what, "install another Python")
    wanted = [Requirement(text) for text in importlib.metadata.requires(OWN_DISTRIBUTION) or []]
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    installed = {each.name: _version(each.name) for each in needed}
    for each in needed:
        version = installed[each.name]
        if version is None or not each.specifier.contains(version, prereleases=True):
            what = f"{each.name} {version or 'is not installed'}, and {each} is needed"
            yield Check(Outcome.PROBLEM, "versions", what, f"pip install '{each}'")
    named = ", ".join(f"{name} {installed.get(name)}" for name in NAMED)
    what = f"Python {platform.python_version()}, {named}, and {len(needed) - len(NAMED)} more were looked at"
    yield Check(Outcome.OK, "versions", what)


def devices(wanted: str) -> Iterator[Check]:
    """Devices that a model can run on.

    :param wanted: ``model.device`` of a configuration.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(Outcome.PROBLEM, "devices", f"torch does not import: {one_line(error)}", "install torch anew")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    there = [f"CPU with {torch.get_num_threads()} threads", *(f"CUDA {name}" for name in names)]
    if torch.backends.mps.is_available():
        there.append("MPS")
    yield Check(Outcome.OK, "devices", ", ".join(there))
    try:
        torch.empty(0, device="cpu" if wanted in ("auto", "balanced") else wanted)
    except (RuntimeError, AssertionError) as error:
        what = f"model.device: {wanted}: {str(error).splitlines()[0]}"
        yield Check(Outcome.PROBLEM, "devices", what, "set model.device to a device that is there, or to auto")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
