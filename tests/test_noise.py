"""Random numbers that do not depend on the device: of the right distribution, and each row's its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from invarlock.datasets.generated import write_text
from invarlock.datasets.layout import WindowLayout
from invarlock.datasets.noise import Noise
from invarlock.models import sizes
from invarlock.testing import architectures

CPU = torch.device("cpu")


def test_numbers_are_uniform_within_rows_columns_and_calls() -> None:
    noise = Noise(42, CPU)
    numbers = torch.stack([noise.uniform(200, 300) for _ in range(5)]).double().numpy()
    assert numbers.min() > 0 and numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for axis in range(3):
        means = numbers.mean(axis=axis).ravel()
        spread = np.sqrt(numbers.shape[axis] * 12) * (means - 0.5)
        assert stats.kstest(spread, "norm").statistic < 0.05, "neighbours are independent"


def test_rows_calls_and_seeds_have_nothing_in_common() -> None:
    noise = Noise(1, CPU)
    rows = torch.cat([noise.uniform(50, 400), noise.uniform(50, 400), Noise(2, CPU).uniform(50, 400)])
    correlations = torch.corrcoef(rows)[~torch.eye(150, dtype=torch.bool)]
    assert correlations.abs().max() < 0.3
    assert correlations.std() == pytest.approx(1 / np.sqrt(400), rel=0.05)


def test_exponential_and_whole_numbers_have_their_distributions() -> None:
    noise = Noise(7, CPU)
    assert stats.kstest(noise.exponential(100, 500).double().numpy().ravel(), "expon").pvalue > 1e-3
    numbers = noise.below(7, 300, 100)
    assert stats.chisquare(torch.bincount(numbers.ravel(), minlength=7).numpy()).pvalue > 1e-3


def test_a_row_does_not_depend_on_how_many_are_drawn_at_once() -> None:
    whole = Noise(3, CPU).uniform(8, 5, 11)
    assert torch.equal(Noise(3, CPU, first=5).uniform(3, 5, 11), whole[5:])


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_text_does_not_depend_on_how_much_is_written_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.ARCHITECTURES[name]()
    masked, start = {"bert": (3, None), "t5": (None, 0)}.get(name, (None, None))
    layout = WindowLayout(12, mask=masked, start=start)
    at_once = write_text(model, layout, 6, seed=5)
    monkeypatch.setattr("invarlock.models.sizes.CPU", sizes.Sizes(4096, 4096, 512, 4096, 4096 * 4096, 24, 24))
    assert torch.equal(write_text(model, layout, 6, seed=5), at_once)
