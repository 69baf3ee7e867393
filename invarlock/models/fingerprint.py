"""A model's tensors in one digest each, to tell whether it changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import xxhash

from invarlock.core.progress import counted
from invarlock.distributed.dtensor import whole
from invarlock.models.digest import block_sums, digest_of, octets_of

NOTHING_KNOWN: Mapping[str, str] = MappingProxyType({})
TIED = "tied to "


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under each of its names; tied ones come once a name."""
    return itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )


def stored_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the named tensors that a checkpoint stores: no buffers that the model's own code computes."""
    computed = frozenset(_computed_buffers(model))
    return ((name, tensor) for name, tensor in named_tensors(model) if name not in computed)


@dataclass(frozen=True)
class Fingerprint:
    """A 128-bit digest of each tensor's dtype, shape and bytes, and which names are tied.

    It tells accidents apart, not forgeries: the hash is not cryptographic.
    """

    tensors: dict[str, str]
    computed: frozenset[str] = frozenset()
    """Buffers that no checkpoint stores: the model's own code computes them, and some do so anew while they run."""

    portable: bool = True

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        *,
        only_computed: bool = False,
        portable: bool = True,
        known: Mapping[str, str] = NOTHING_KNOWN,
    ) -> Fingerprint:
        """Fingerprint of all tensors of a model, or of its computed buffers alone.

        :param portable: digests that are the same on every device, made where the tensors are; or else hashes of the
            host's, which take a quarter of the time on a CPU.
        :param known: digests by the name of the tensor, of those that need not be read.
        """
        computed = frozenset(_computed_buffers(model))
        names_by_identity: dict[int, str] = {}
        numbers: dict[str, torch.Tensor] = {}
        tensors = [(name, tensor) for name, tensor in named_tensors(model) if not only_computed or name in computed]
        for name, tensor in counted(tensors, lambda named: named[1].nbytes):
            if names_by_identity.setdefault(id(tensor), name) == name and name not in known:
                numbers[name] = (block_sums if portable else octets_of)(whole(tensor.detach()))
        # Only now on the host: a device works on the last tensors while the first ones are hashed.
        return cls(
            {name: known.get(name) or _digest(tensor, name, names_by_identity, numbers) for name, tensor in tensors},
            computed,
            portable,
        )

    @property
    def digest(self) -> str:
        """One digest of all that a checkpoint stores."""
        stored = (f"{name} {value}" for name, value in self.tensors.items() if name not in self.computed)
        return xxhash.xxh3_128_hexdigest("\n".join(stored).encode())

    def changed_since(self, earlier: Fingerprint) -> list[str]:
        """Names of the tensors that differ, appeared or vanished."""
        names = self.tensors | earlier.tensors
        return [name for name in names if self.tensors.get(name) != earlier.tensors.get(name)]

    def shared_with(self, other: Fingerprint) -> frozenset[str]:
        """Names of the tensors that are the same in both; of tied ones, the first."""
        same = (self.tensors.items() & other.tensors.items()) if self.portable == other.portable else ()
        return frozenset(name for name, value in same if not value.startswith(TIED))


def _computed_buffers(model: torch.nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        yield from (f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set)


def _digest(tensor: torch.Tensor, name: str, first: Mapping[int, str], numbers: Mapping[str, torch.Tensor]) -> str:
    if name not in numbers:
        return f"{TIED}{first[id(tensor)]}"
    return digest_of(f"{tensor.dtype} {tuple(tensor.shape)} ", numbers[name])
