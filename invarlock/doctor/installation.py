"""The plugins, the versions and the devices of this installation; imports torch only where it is looked at."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from invarlock.core.errors import one_line
from invarlock.doctor.findings import Finding, Status
from invarlock.plugins.catalog import Catalog
from invarlock.plugins.plugin import OWN_DISTRIBUTION, Plugin
from invarlock.plugins.plugin import Status as PluginStatus

NAMED = ("torch", "transformers")
"""Distributions whose versions a reader of the findings needs."""


def plugins(found: Catalog) -> Iterator[Finding]:
    """Each plugin that cannot be used and why; how many can."""
    ready = [plugin for plugin in found.plugins if plugin.status is PluginStatus.READY]
    yield Finding(Status.OK, "plugins", f"{len(ready)} are ready")
    for plugin in found.plugins:
        if plugin not in ready:
            yield _unready(plugin)


def _unready(plugin: Plugin) -> Finding:
    what = f"{plugin.label}: {plugin.error}"
    if plugin.options_missing:
        return Finding(Status.OK, "plugins", what, f"give its options as guards.{plugin.name}.OPTION")
    if plugin.status is PluginStatus.BLOCKED:
        return Finding(Status.NOT_CHECKED, "plugins", what)
    if plugin.status is PluginStatus.MISSING:
        return Finding(Status.WARNING, "plugins", what, "install it if you need the plugin")
    who = f"{plugin.distribution} {plugin.version}" if plugin.distribution else plugin.module
    return Finding(Status.PROBLEM, "plugins", what, f"update or remove {who}, or turn it off: -p no:{plugin.name}")


def versions() -> Iterator[Finding]:
    """Python and every distribution that is required, against what this package asks for."""
    try:
        own = importlib.metadata.metadata(OWN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(Status.NOT_CHECKED, "versions", "invarlock is not installed as a distribution", "pip install .")
        return
    if platform.python_version() not in SpecifierSet(own["Requires-Python"]):
        what = f"Python {platform.python_version()} is not {own['Requires-Python']}"
        yield Finding(Status.PROBLEM, "versions", what, "install another Python")
    wanted = [Requirement(text) for text in importlib.metadata.requires(OWN_DISTRIBUTION) or []]
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    installed = {each.name: _version(each.name) for each in needed}
    for each in needed:
        version = installed[each.name]
        if version is None or not each.specifier.contains(version, prereleases=True):
            what = f"{each.name} {version or 'is not installed'}, and {each} is needed"
            yield Finding(Status.PROBLEM, "versions", what, f"pip install '{each}'")
    named = ", ".join(f"{name} {installed.get(name)}" for name in NAMED)
    what = f"Python {platform.python_version()}, {named}, and {len(needed) - len(NAMED)} more were looked at"
    yield Finding(Status.OK, "versions", what)


def devices(wanted: str) -> Iterator[Finding]:
    """Devices that a model can run on.

    :param wanted: ``model.device`` of a configuration.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(Status.PROBLEM, "devices", f"torch does not import: {one_line(error)}", "install torch anew")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    there = [f"CPU with {torch.get_num_threads()} threads", *(f"CUDA {name}" for name in names)]
    if torch.backends.mps.is_available():
        there.append("MPS")
    yield Finding(Status.OK, "devices", ", ".join(there))
    try:
        torch.empty(0, device="cpu" if wanted in ("auto", "balanced") else wanted)
    except (RuntimeError, AssertionError) as error:
        what = f"model.device: {wanted}: {str(error).splitlines()[0]}"
        yield Finding(Status.PROBLEM, "devices", what, "set model.device to a device that is there, or to auto")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
