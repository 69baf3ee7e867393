"""SHA-256 digests of files: of those that were written, and checks of those that are read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

from invarlock.core.errors import InputError
from invarlock.core.progress import counted

SUMS = "SHA256SUMS"
"""Output of ``sha256sum *.safetensors``, beside the files."""
# An asterisk says that the file was read as bytes.
LINE = re.compile(
    r"SHA256 \((?P<bsd_name>.+)\) = (?P<bsd_digest>[0-9a-fA-F]{64})|\\?(?P<digest>[0-9a-fA-F]{64})\s+\*?(?P<name>.+)"
)
"""GNU's form, and that of BSD and ``sha256sum --tag``."""

log = logging.getLogger("invarlock")


def digests(folder: Path, name: str) -> dict[str, str]:
    """Digests of all files below a folder, by their paths there, under the name that the folder will have."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{name}/{path.relative_to(folder).as_posix()}": digest_of(path) for path in counted(files, _size)}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(checkpoint: Path, rank: int = 0, size: int = 1) -> None:
    """Hold the weights of a checkpoint against the digests that lie beside them, if there are any.

    :param checkpoint: a folder, or a single file.
    :param rank: which of ``size`` processes that share the files this one is.
    :raises InputError: a file is not what its digest says: bits flipped, or it was changed.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    known = _known(folder)
    weights = sorted(folder.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    files = [path for path in weights if path.name in known][rank::size]
    if weights and (folder / SUMS).is_file() and not rank and not any(path.name in known for path in weights):
        log.warning("%s lists none of the weight files beside it: their digests were not checked", folder / SUMS)
    for path in counted(files, _size):
        source, expected = known[path.name]
        if digest_of(path) != expected:
            raise InputError(
                f"{path} does not match its digest in {folder / source}; fetch it again, or remove the "
                "digests if it was changed on purpose"
            )


def _size(path: Path) -> int:
    return path.stat().st_size


def _known(folder: Path) -> dict[str, tuple[str, str]]:
    """Source of the digest of a file, and the digest, by the name of the file."""
    known: dict[str, tuple[str, str]] = {}
    if (folder / "report.json").is_file():
        known |= {name: ("report.json", digest) for name, digest in _of_report(folder / "report.json").items()}
    if (folder / SUMS).is_file():
        known |= {name: (SUMS, digest) for name, digest in listed(folder / SUMS).items()}
    return known


def listed(sums: Path) -> dict[str, str]:
    """Digests in an output of ``sha256sum``, by the names of the files."""
    known: dict[str, str] = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := LINE.fullmatch(line.strip()):
            name = found["bsd_name"] or found["name"]
            known[name.removeprefix("./")] = (found["bsd_digest"] or found["digest"]).lower()
    return known


def _of_report(path: Path) -> dict[str, str]:
    """Digests of the model that a run saved beside its report; empty for any other file."""
    try:
        artifacts = json.loads(path.read_text(encoding="utf-8"))["artifacts"]
        return {name.removeprefix("model/"): str(digest) for name, digest in artifacts.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
