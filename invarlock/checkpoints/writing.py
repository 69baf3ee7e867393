"""A run's output folder, and artifacts that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from invarlock.core.errors import UsageError, one_line

SIGNATURE = "run.sigstore.json"
"""A bundle goes by this ending."""
ARTIFACTS = ("report.json", "report.html", "model", SIGNATURE)
PARTIAL = ".model.partial"
"""Where a model is until it is whole."""
JOURNALS = ".model.journals"
"""What is whole of one that is written shard by shard."""


@contextmanager
def unwritable_said(path: Path, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What the system says of a disk that is full, or of a folder that may not be written to, as one line.

    :raises UsageError: in place of an ``OSError``, after ``undo``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        undo()
        raise UsageError(f"output.dir: {path} could not be written: {one_line(error)}") from error


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that becomes ``target`` when the block ends well, and else vanishes.

    What an earlier process left there, that was killed, goes first.
    """
    staged = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        put_in_place(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def put_in_place(staged: Path, target: Path) -> None:
    """Let a whole folder take its place, readable for everybody that the umask allows."""
    mask = _umask()
    for path in (staged, *staged.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    staged.rename(target)


def write_text(target: Path, text: str) -> None:
    """Write a file to the side and rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent)
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


@dataclass(frozen=True)
class OutputFolder:
    """Where the artifacts of one run go."""

    path: Path
    force: bool = False
    sign: Callable[[Path], None] | None = None
    """Called with the folder when all is written; what else lies in the folder would be signed, too."""

    def check(self, model_id: str) -> None:
        """Refuse, before anything is loaded, what must not be written to.

        :raises UsageError: another run's output lies there, or the folder and the input checkpoint lie in each other.
        """
        checkpoint, folder = Path(model_id).resolve(), self.path.resolve()
        if checkpoint.is_dir() and (checkpoint == folder or checkpoint in folder.parents):
            raise UsageError(
                f"output.dir: {self.path} lies inside the input checkpoint {model_id}; choose another folder"
            )
        for name in (*ARTIFACTS, PARTIAL):
            artifact = (folder / name).resolve()
            if checkpoint.exists() and (checkpoint == artifact or artifact in checkpoint.parents):
                raise UsageError(f"output.dir: {self.path / name} is, or holds, the input {model_id}; choose another")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output.dir: {self.path} is a file; choose a folder")
        there = [name for name in ARTIFACTS if (self.path / name).exists()]
        # A run that was killed when it had saved the model, and not yet all of its report, is no other one's.
        saved = there == ["model"] and (self.path / "model" / "report.json").is_file()
        unfinished = saved or ((self.path / JOURNALS).is_dir() and "report.html" not in there)
        if there and not self.force and not unfinished:
            raise UsageError(f"output.dir: {self.path} holds another run's {there[0]}; choose another or add --force")
        if self.sign and (others := self._others()):
            raise UsageError(f"output.dir: {self.path} holds {others[0]}, which would be signed along; choose another")
        nearest_existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(nearest_existing, os.W_OK):
            raise UsageError(f"output.dir: no permission to write to {nearest_existing}")

    def _others(self) -> list[str]:
        """What no run wrote."""
        known = (*ARTIFACTS, PARTIAL, JOURNALS)
        return sorted(path.name for path in self.path.glob("*") if path.name not in known)

    def clear_unfinished(self) -> None:
        """Remove what streamed runs go on with when they are killed, once all is written."""
        for name in (PARTIAL, JOURNALS):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def clear(self) -> None:
        """Remove what an earlier run left, now that this one has something to put in its place."""
        for name in ARTIFACTS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
