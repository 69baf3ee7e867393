"""The digest of a tensor: the sums of its definition, however a device makes them, and no change unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from invarlock.models import sizes
from invarlock.models.digest import BLOCK, block_sums

MASK = 2**64 - 1


def factor(stream: int, place: int) -> int:
    """splitmix64 of the place, made odd, in Python's own integers."""
    mixed = (stream * BLOCK + place + 1) * 0x9E3779B97F4A7C15 & MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
    return mixed ^ mixed >> 31 | 1


def by_definition(octets: bytes) -> list[list[int]]:
    """The sums of one block: 32-bit words, signed as a device has them, zeros after the last."""
    octets += bytes(-len(octets) % 4)
    words = [int.from_bytes(octets[start : start + 4], "little", signed=True) for start in range(0, len(octets), 4)]
    sums = [sum(word * factor(stream, place) for place, word in enumerate(words)) & MASK for stream in range(2)]
    return [[found - 2**64 if found >> 63 else found for found in sums]]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 13),
        torch.randn(3, 5).bfloat16(),
        torch.randn(5).half(),
        torch.tensor([True, False, True]),
        torch.tensor(3.5),
        torch.randn(4, 6).T,
        torch.randn(9).bfloat16()[1:],
        torch.randn(3).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_sums_are_those_of_the_definition(tensor: Tensor) -> None:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert block_sums(tensor).tolist() == by_definition(octets)


def test_an_empty_tensor_has_no_sums() -> None:
    assert block_sums(torch.empty(0, 4)).shape == (0, 2)
    assert block_sums(torch.empty(3, 4, device="meta")).shape == (0, 2)


@pytest.mark.parametrize("words", [1, 3 * BLOCK, 100 * BLOCK])
def test_sums_do_not_depend_on_how_much_is_done_at_once(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7 * BLOCK + 5)
    at_once = block_sums(tensor)
    assert at_once.shape == (8, 2)
    monkeypatch.setattr(sizes, "CPU", replace(sizes.CPU, words=words))
    assert torch.equal(block_sums(tensor), at_once)


def test_two_sign_bits_do_not_cancel_out() -> None:
    tensor = torch.randn(64)
    sums = block_sums(tensor)
    for first in range(0, 64, 7):
        for second in range(first + 1, 64, 5):
            changed = tensor.clone()
            changed[[first, second]] *= -1
            assert (block_sums(changed) != sums).all(), "each of both sums, by itself"


def test_exchanged_blocks_and_words_are_seen() -> None:
    tensor = torch.randn(2 * BLOCK)
    assert not torch.equal(block_sums(tensor), block_sums(tensor.roll(BLOCK)))
    assert not torch.equal(block_sums(tensor), block_sums(tensor.flip(0)))
