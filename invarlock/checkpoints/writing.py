"""A run's output folder, and artifacts that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from invarlock.core.errors import UsageError, one_line

ARTIFACTS = ("report.json", "model")


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
def staged_folder(target: Path, staged: Path | None = None) -> Iterator[Path]:
    """A folder beside ``target`` that becomes ``target`` when the block ends well, and vanishes when it does not.

    :param staged: one that is there already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = staged or Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())
        for file in staged.iterdir():
            file.chmod(0o666 & ~_umask())
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


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


def digests(folder: Path, name: str) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there, under the name that the folder will have."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[f"{name}/{path.relative_to(folder).as_posix()}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@dataclass(frozen=True)
class OutputFolder:
    """Where the artifacts of one run go."""

    path: Path
    force: bool = False

    def check(self, model_id: str) -> None:
        """Refuse, before anything is loaded, what must not be written to.

        :raises UsageError: another run's output lies there, or the folder lies in the input checkpoint.
        """
        checkpoint, folder = Path(model_id).absolute(), self.path.absolute()
        if checkpoint.is_dir() and (checkpoint == folder or checkpoint in folder.parents):
            raise UsageError(
                f"output.dir: {self.path} lies inside the input checkpoint {model_id}; choose another folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output.dir: {self.path} is a file; choose a folder")
        there = [name for name in ARTIFACTS if (self.path / name).exists()]
        if there and not self.force:
            raise UsageError(f"output.dir: {self.path} holds another run's {there[0]}; choose another or add --force")
        nearest_existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(nearest_existing, os.W_OK):
            raise UsageError(f"output.dir: no permission to write to {nearest_existing}")

    def clear(self) -> None:
        """Remove what an earlier run left, now that this one has something to put in its place."""
        for name in ARTIFACTS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def staged_model(self, staged: Path | None = None) -> AbstractContextManager[Path]:
        """An empty folder, or the one given, that becomes the model's if the block ends well."""
        return staged_folder(self.path / "model", staged)
