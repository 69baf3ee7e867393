"""A run's output folder, and artifacts that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from invarlock.checkpoints import swapping
from invarlock.checkpoints.claiming import LOCK, Claim
from invarlock.checkpoints.swapping import is_folder, is_there
from invarlock.core.errors import UsageError, one_line
from invarlock.distributed.process_group import ALONE, Ranks

SIGNATURE = "run.sigstore.json"
"""A bundle goes by this ending."""
ARTIFACTS = ("report.json", "report.html", "model", SIGNATURE)
SEARCH = "search.json"
"""Plans that a search judged so far; it goes once the report holds them."""
PARTIAL = ".model.partial"
"""Folder of a model until it is whole."""
JOURNALS = ".model.journals"
"""Folder of the whole shards of an output that is written shard by shard."""
OURS = (*ARTIFACTS, SEARCH, PARTIAL, JOURNALS)
"""Folder names that make room for the output of a run."""


@contextmanager
def unwritable_said(path: Path, key: str = "output.dir") -> Iterator[None]:
    """Turn complaints of the system about a full disk, or a folder that may not be written to, into one line.

    :raises UsageError: in place of an ``OSError``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{key}: {path} could not be written: {one_line(error)}") from error


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that becomes ``target`` when the block ends well, and else vanishes."""
    if not target.parent.exists():
        target.parent.mkdir(parents=True)
    staged = Path(tempfile.mkdtemp(prefix=".invarlock.", suffix=".partial", dir=target.parent))
    try:
        yield staged
        let_read(staged)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def let_read(folder: Path) -> None:
    """Make all that is in a folder readable for everybody that the umask allows."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_text(target: Path, text: str) -> None:
    """Write a file to the side and rename it into place.

    :raises OSError: also where something other than a file is in its place: a link, a folder, a pipe, a device.
    """
    if is_there(target) and not stat.S_ISREG(target.lstat().st_mode):
        raise FileExistsError("it is not a regular file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".invarlock.", suffix=".partial", dir=target.parent)
    staged = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o666 & ~_umask())
        staged.replace(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass
class OutputFolder:
    """Folder for the artifacts of one run."""

    path: Path
    force: bool = False
    sign: Callable[[Path], None] | None = None
    """Called with a folder of all that is written, before it takes its place."""
    made: list[Path] = field(default_factory=list)
    """Folders that were made for it; they go if nothing comes of it."""
    saved: bool = False
    """True once what the run wrote is in its place."""

    def __post_init__(self) -> None:
        self._claim = Claim(self.path, self.made)

    @contextmanager
    def claimed(self, *model_ids: str, ranks: Ranks = ALONE) -> Iterator[None]:
        """Before anything is loaded: keep other runs out of the folder, and refuse what must not be written to.

        The first process claims it for all of the run.

        :param model_ids: the input checkpoints.
        :raises UsageError: on all processes: another run is writing there, or its output is there; or the folder and an
            input lie in each other; or it cannot be written to.
        """
        try:
            if refusal := ranks.from_first(lambda: self._refusal(model_ids)):
                raise UsageError(refusal)
            yield
        finally:
            self.release()

    def check(self, model_id: str) -> None:
        """Refuse what must not be written to, without claiming it.

        :raises UsageError: as ``claimed`` does.
        """
        self._check_place(model_id)
        self._check_content()

    def _refusal(self, model_ids: Sequence[str]) -> str | None:
        try:
            with unwritable_said(self.path):
                for model_id in model_ids:
                    self._check_place(model_id)
                self._claim.take()
                self._sweep()
            self._check_content()
        except UsageError as error:
            return one_line(error)
        return None

    def release(self) -> None:
        """Leave the folder to others, without what is not whole."""
        if self._claim.handle is not None:
            self._sweep()
            self._claim.release()

    def _check_place(self, model_id: str) -> None:
        checkpoint, folder = Path(model_id).resolve(), self.path.resolve()
        if checkpoint.is_dir() and (checkpoint == folder or checkpoint in folder.parents):
            raise UsageError(f"output.dir: {self.path} lies inside the input {model_id}; choose another folder")
        for name in (*OURS, *(path.name for path in swapping.stagings(folder))):
            artifact = (folder / name).resolve()
            if checkpoint.exists() and (checkpoint == artifact or artifact in checkpoint.parents):
                raise UsageError(f"output.dir: {self.path / name} is, or holds, the input {model_id}; choose another")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output.dir: {self.path} is a file; choose a folder")
        nearest_existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(nearest_existing, os.W_OK):
            raise UsageError(f"output.dir: no permission to write to {nearest_existing}")

    def _check_content(self) -> None:
        there = [name for name in ARTIFACTS if is_there(self.path / name)]
        if there and not self.force:
            raise UsageError(f"output.dir: {self.path} holds another run's {there[0]}; choose another or add --force")
        others = sorted(path.name for path in self.path.glob("*") if path.name not in (*OURS, LOCK))
        if self.sign and others:
            raise UsageError(
                f"output.dir: {self.path} holds {others[0]}, which would not be signed along; choose another"
            )

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """An empty folder whose files take the place of an earlier run's when the block ends well, and else vanish."""
        staging = swapping.new_staging(self.path)
        try:
            yield staging / swapping.NEW
            let_read(staging / swapping.NEW)
            swapping.swap(staging, self.path, OURS)
        finally:
            self.saved = swapping.is_swapped(staging)
            self._sweep()

    def _sweep(self) -> None:
        """Remove what is not whole, of this process or of one that was killed, but for shards to go on with."""
        for staging in swapping.stagings(self.path):
            if is_folder(staging):
                swapping.undo(staging, self.path, OURS)
                self._keep_shards(staging / swapping.NEW / "model")
            swapping.remove(staging)

    def _keep_shards(self, model: Path) -> None:
        if is_folder(model) and is_folder(self.path / JOURNALS) and not is_there(self.path / PARTIAL):
            model.rename(self.path / PARTIAL)

    @property
    def kept(self) -> str:
        """Description of the run's output as it is by now."""
        if self.saved:
            what = "the report and the model" if is_there(self.path / "model") else "the report"
            return f"{what} had been saved to {self.path}"
        if (self.path / SEARCH).is_file():
            return "nothing was saved but the plans that were judged, from which the same command goes on"
        if any(self.path.glob(f"{JOURNALS}/*.json")):
            return "nothing was saved but whole shards, from which the same command goes on"
        return "nothing was saved"
