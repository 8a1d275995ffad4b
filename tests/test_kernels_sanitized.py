"""The kernels under the sanitizers for addresses, leaks and undefined behaviour: they touch only what is theirs.

`kernels_check` is C alone and allocates every block to the byte. `test_kernels_mutants.py` shows what this finds.
"""

from __future__ import annotations

import os
import subprocess

import pytest
from native import REPOSITORY, SANITIZERS, cmake_build


@pytest.mark.slow
def test_every_target_is_right_and_clean() -> None:
    folder = REPOSITORY / "build" / "check-sanitized"
    cmake_build(REPOSITORY, folder, "kernels_check", f"-O1 -g {SANITIZERS}")
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([folder / "kernels_check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("trials each: all equal\n")
