"""The kernel that rounds on a device, in Triton's interpreter: the bits of the plain operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import interpreted_kernel
import pytest

pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA, and with the extra test on Linux")

CASES = [f"{make.__name__} {dtype}" for make, dtype in product(interpreted_kernel.WEIGHTS, interpreted_kernel.DTYPES)]


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_kernel.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_rounds_to_the_bits_of_plain_operations(case: str, found: dict[str, list[str]]) -> None:
    assert found[case] == []


def test_a_convolution_is_rounded_by_its_output_channels(found: dict[str, list[str]]) -> None:
    assert found["convolution"] == []


def test_the_alike_weights_of_a_model_are_rounded_together(found: dict[str, list[str]]) -> None:
    assert found["models"] == []


def test_a_row_longer_than_a_program_holds_is_left_to_plain_operations(found: dict[str, list[str]]) -> None:
    assert found["too long"] == []


def test_the_sums_of_a_digest_are_those_of_plain_operations(found: dict[str, list[str]]) -> None:
    assert found["sums"] == []
