"""The needs of a configuration, against this machine: guards, output, memory, disk, model, edit, text, hub.

No weights are loaded.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import torch

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.checkpoints.reader import Checkpoint
from invarlock.config.schema import RunConfig
from invarlock.core.errors import InvarlockError, NotStreamedError, UsageError, named_by, one_line
from invarlock.core.inputs import complaints_of
from invarlock.core.memory import free_memory
from invarlock.core.paths import absolute
from invarlock.datasets.windows import check_lengths
from invarlock.doctor.findings import Check, Outcome, size
from invarlock.models.snapshot import has_room
from invarlock.pipeline.planning.plans import check, export_of, plans_of, weights_of
from invarlock.pipeline.session import BASELINE, Baseline, Session
from invarlock.plugins.classes import OptionNotTakenError
from invarlock.plugins.manager import PluginManager
from invarlock.plugins.plugin import Kind, Origin

SHARE, MORE = 1.5, 2**30
"""A run in memory takes at most so many times its weights, and so many bytes more."""


def guards(config: RunConfig, manager: PluginManager) -> Iterator[Check]:
    """Construct the guards with their options, and find the adapter."""
    try:
        slots = manager.guard_slots(config.guards.order, config.guards.options)
        if config.model.adapter != "auto":
            manager.catalog.get(config.model.adapter, Kind.ADAPTER, "model.adapter")
    except InvarlockError as error:
        yield Check(Outcome.PROBLEM, "guards", one_line(error), "correct the configuration, or install what is missing")
    else:
        yield Check(Outcome.OK, "guards", f"{', '.join(slot.name for slot in slots)} can be constructed")


def space(config: RunConfig) -> Iterator[Check]:
    """Memory and disk, against the size of the model."""
    try:
        with named_by(BASELINE):
            weights = _nbytes(config)
    except UsageError as error:
        yield Check(Outcome.PROBLEM, "memory", one_line(error), "correct model.id, or the checkpoint")
        return
    if weights is None:
        yield Check(Outcome.NOT_CHECKED, "memory", f"the size of {config.model.id} is not known without loading it")
        return
    yield _memory(config, weights)
    # The weights are in memory as well by then.
    if not has_room(weights + weights // 2):
        todo = "set TMPDIR to a larger disk, or run --stream"
        yield _disk(Path(tempfile.gettempdir()), weights, "the snapshot", todo)
    output = Path(config.output.dir or "runs").absolute()
    saved = weights if config.output.save_model else 0
    yield _disk(output, saved + 2**24, "the output", "choose another output.dir")


def output(config: RunConfig) -> Iterator[Check]:
    """Check that the output folder can be written to."""
    folder = Path(config.output.dir or Path("runs", "new"))
    try:
        OutputFolder(folder).check(config.model.id)
    except InvarlockError as error:
        yield Check(Outcome.PROBLEM, "output", one_line(error), "choose another output.dir, or run with --force")
    else:
        yield Check(Outcome.OK, "output", f"{absolute(folder)} can be written to")


def model(config: RunConfig, manager: PluginManager) -> Iterator[Check]:
    """The checkpoint, the weights that are quantized, and whether there is enough text; the weights stay on disk."""
    # Devices are another finding.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cpu"))
    session = Session(config, manager)
    try:
        opened, adapter = session.load(config.model.id, stream=True)
    except InvarlockError as error:
        yield _unopened(config, manager, error)
        yield Check(Outcome.NOT_CHECKED, "edit", "needs the model")
        yield _unread(session) or Check(Outcome.NOT_CHECKED, "text", "needs the model")
        return
    yield Check(Outcome.OK, "model", f"{adapter.name} opens it")
    try:
        weights = weights_of(config, opened)
        baseline = Baseline(session, opened, adapter, wants_tokenizer=config.output.save_model)
        if export := export_of(config, manager):
            check(export, plans_of(config), opened, baseline.tokenizer)
    except InvarlockError as error:
        yield Check(Outcome.PROBLEM, "edit", one_line(error), "correct the configuration")
        yield _unread(session) or Check(Outcome.NOT_CHECKED, "text", "needs a sound edit")
        return
    yield Check(Outcome.OK, "edit", f"{len(weights)} weights would be quantized")
    yield _text(config, baseline, opened)


def _unopened(config: RunConfig, manager: PluginManager, error: InvarlockError) -> Check:
    others = [plugin.name for plugin in manager.catalog.of_kind(Kind.ADAPTER) if plugin.origin is not Origin.BUILTIN]
    # One that cannot leave weights on disk may load it all the same.
    asked = others if config.model.adapter == "auto" else []
    if asked or isinstance(error, NotStreamedError | OptionNotTakenError):
        return Check(Outcome.NOT_CHECKED, "model", f"cannot be opened without its weights: {one_line(error)}")
    return Check(Outcome.PROBLEM, "model", one_line(error), "correct model.id, or the checkpoint")


def _unread(session: Session) -> Check | None:
    """The problem of a provider that gives no text, or None."""
    try:
        session.documents()
    except InvarlockError as error:
        return Check(Outcome.PROBLEM, "text", one_line(error), "correct the section dataset, or the provider")
    return None


def _text(config: RunConfig, baseline: Baseline, opened: torch.nn.Module) -> Check:
    dataset = config.dataset
    try:
        if dataset.is_generated:
            # Weights on disk would be read anew for each token that is written.
            if not baseline.task.towers:  # Else a window holds as much text as fits.
                check_lengths(baseline.dataset, opened)
            made_up = baseline.task.made_up
            what = f"samples are {made_up}" if made_up else "the baseline writes its own windows"
            return Check(Outcome.OK, "text", what)
        baseline.make_windows(opened)
    except InvarlockError as error:
        return Check(Outcome.PROBLEM, "text", one_line(error), "correct the configuration, or give more text")
    what = f"enough for {dataset.preview_n} + {baseline.dataset.final_n} windows of {dataset.seq_len} tokens"
    return Check(Outcome.OK, "text", what)


def hub(config: RunConfig, *, allow_network: bool) -> Iterator[Check]:
    """Check that a hub can be reached, if the configuration needs one."""
    folder = _folder(config)
    if folder is not None:
        where = "on this machine" if Path(config.model.id).exists() else f"in the cache, {folder}"
        yield Check(Outcome.OK, "hub", f"not needed: the checkpoint is {where}")
        return
    if not allow_network:
        what = f"{config.model.id} is not on this machine, and the network is off"
        yield Check(Outcome.PROBLEM, "hub", what, "check the path; or add --allow-network to ask the hub")
        return
    try:
        huggingface_hub.model_info(config.model.id, revision=config.model.revision)
    except Exception as error:
        # Whatever hinders it is what was asked for; its libraries raise errors of many kinds.
        yield Check(Outcome.PROBLEM, "hub", one_line(error), "check model.id, the network and your access token")
    else:
        yield Check(Outcome.OK, "hub", f"{config.model.id} can be fetched")


def _folder(config: RunConfig) -> Path | None:
    """Path of the checkpoint on this machine, in a hub's cache too."""
    path = Path(config.model.id)
    if path.exists():
        return path
    try:
        return Path(
            huggingface_hub.snapshot_download(config.model.id, revision=config.model.revision, local_files_only=True)
        )
    # No name of a hub is a ValueError.
    except (OSError, ValueError):
        return None


def _nbytes(config: RunConfig) -> int | None:
    """Bytes that the weights take in memory, from the headers of their files; None where these do not tell.

    :raises InputError: the checkpoint is broken.
    """
    path = _folder(config)
    if path is not None and path.suffix == ".gguf" and path.is_file() and find_spec("gguf"):
        import gguf

        with complaints_of(f"{path}: cannot be read"):
            counts = [int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors]
        return sum(counts) * _itemsize(config, torch.float32)
    if path is None or not path.is_dir():
        return None
    entries = Checkpoint(path).entries.values()
    if any(not entry.dtype.is_floating_point for entry in entries):
        return None
    return sum(math.prod(entry.shape) * _itemsize(config, entry.dtype) for entry in entries)


def _itemsize(config: RunConfig, stored: torch.dtype) -> int:
    dtype: torch.dtype = stored if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    return dtype.itemsize


def _memory(config: RunConfig, weights: int) -> Check:
    device = config.model.device
    if torch.cuda.is_available() and device.startswith(("auto", "balanced", "cuda")):
        free, where = torch.cuda.mem_get_info()[0], "of the CUDA device"
    else:
        free, where = free_memory(), "of memory"
    needed = SHARE * weights + MORE
    what = f"a run takes up to {size(needed)} ({size(weights)} of weights), {size(free)} {where} are free"
    if needed <= free:
        return Check(Outcome.OK, "memory", what)
    return Check(Outcome.PROBLEM, "memory", what, "leave the weights on disk: invarlock run --stream")


def _disk(folder: Path, needed: int, purpose: str, todo: str) -> Check:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    what = f"{purpose} takes up to {size(needed)}, {size(free)} are free on the disk of {there}"
    return Check(Outcome.OK, "disk", what) if needed <= free else Check(Outcome.PROBLEM, "disk", what, todo)
