"""A minute of fuzzing of the kernels' Python boundary, from the recorded corpus on; see docs/kernels.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60
TESTS = Path(__file__).parent


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    (tmp_path / "found").mkdir()
    options = [
        "-seed=1",
        f"-max_total_time={SECONDS}",
        "-len_control=0",
        "-max_len=256",
        f"-artifact_prefix={tmp_path}/",
    ]
    command = [sys.executable, TESTS / "fuzz_kernels.py", *options, tmp_path / "found", TESTS / "fuzz_corpus"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-10_000:]
    assert "\nDone " in done.stdout
