"""Signatures over a run's folder: an in-toto statement in a sigstore bundle, by OpenSSF model-signing, offline.

What is signed is the SHA-256 of every file in the folder, so that a file which is added is found as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from invarlock.checkpoints.claiming import LOCK
from invarlock.checkpoints.output_folder import SIGNATURE
from invarlock.core.errors import InvarlockError, UsageError, one_line
from invarlock.core.paths import absolute
from invarlock.evidence.disagreements import ABSENT, Disagreement

MISMATCH = "Signature mismatch: "
"""Before a list of strings."""


@dataclass(frozen=True)
class Signer:
    """Signs with a private key, which is read when the signer is made: before anything is measured."""

    configured: Any

    @classmethod
    def of(cls, key: str) -> Signer:
        """:raises UsageError: the file cannot be read, or holds no private key of an elliptic curve."""
        configuration = _library("--sign", "signing").Config()
        with _key_said(f"--sign {absolute(key)}"):
            return cls(configuration.use_elliptic_key_signer(private_key=key))

    def sign(self, folder: Path) -> None:
        """Write the signature of all that is in a folder, to it.

        :raises InvarlockError: the library cannot; what is in the folder stays.
        """
        try:
            self.configured.set_hashing_config(_every_file("--sign")).sign(folder, folder / SIGNATURE)
        except (ValueError, TypeError, OSError) as error:
            raise InvarlockError(f"--sign: the output is whole, but could not be signed: {one_line(error)}") from error


def signature(folder: Path, public_key: str) -> Iterator[Disagreement]:
    """Check that the files of a folder are those that the owner of a key signed.

    :raises UsageError: the key cannot be read.
    """
    configuration = _library("--public-key", "verifying").Config().set_hashing_config(_every_file("--public-key"))
    with _key_said(f"--public-key {absolute(public_key)}"):
        verifier = configuration.use_elliptic_key_verifier(public_key=public_key)
    if not (folder / SIGNATURE).is_file():
        yield Disagreement(SIGNATURE, ABSENT, "a signature", how="expected")
        return
    # The library raises whatever comes of a bundle that is none.
    from cryptography.exceptions import InvalidSignature

    try:
        verifier.verify(folder, folder / SIGNATURE)
    except InvalidSignature:
        yield Disagreement(SIGNATURE, "a signature", "it is not of this key, or was changed", how="found")
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        for said in _mismatches(error):
            yield Disagreement(SIGNATURE, "a signature of this folder", said, how="found")


def _mismatches(error: Exception) -> list[str]:
    """The library's complaint, a line for each file; the digests, which it prints as bytes, are left out."""
    text = str(error)
    if not text.startswith(MISMATCH):
        return [one_line(error)]
    return [each.partition(": Expected ")[0] for each in ast.literal_eval(text.removeprefix(MISMATCH))]


def _every_file(option: str) -> Any:
    return _library(option, "hashing").Config().set_ignored_paths(paths=[SIGNATURE, LOCK], ignore_git_paths=False)


def _library(option: str, module: str) -> Any:
    try:
        # Here, because it is optional, and slow to import.
        return import_module(f"model_signing.{module}")
    except ImportError:
        raise UsageError(f"{option}: needs model-signing: pip install 'invarlock[sign]'") from None


@contextmanager
def _key_said(option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option}: the key cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        # A key of another kind has no curve, an encrypted one is a TypeError without its password.
        raise UsageError(
            f"{option}: is no unencrypted PEM key of the curve P-256, P-384 or P-521 ({one_line(error)})"
        ) from None
