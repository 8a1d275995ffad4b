"""Builds parts of the C extension for tests: with sanitizers, from a damaged copy, for a fuzzer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import cmake

REPOSITORY = Path(__file__).parent.parent

SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"


def cmake_build(
    source: Path, folder: Path, target: str, c_flags: str, compiler: str = "cc", *, toolchain: Path | None = None
) -> None:
    """Build `target` of the CMake project in `source`, of which `folder` keeps what did not change since the last time.

    Args:
        toolchain: CMake's description of another machine and its compiler, to build for it.

    Raises:
        RuntimeError: It does not build, with the compiler's words.
    """
    options = {
        "CMAKE_BUILD_TYPE": "",
        **({"CMAKE_TOOLCHAIN_FILE": toolchain} if toolchain else {"CMAKE_C_COMPILER": compiler}),
        "CMAKE_C_FLAGS": c_flags,
        "EDGEVLM_CHECK": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    _cmake("-S", source, "-B", folder, *(f"-D{name}={value}" for name, value in options.items()))
    _cmake("--build", folder, "--target", target, "--parallel", 2)


def use_extension(path: str | Path) -> None:
    """Put this build of the C extension in the place of the installed one. Before `edgevlm.kernels` is imported."""
    spec = importlib.util.spec_from_file_location("edgevlm._kernels", path)
    assert spec
    assert spec.loader
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["edgevlm._kernels"] = extension


def _cmake(*arguments: Any) -> None:
    command = [f"{cmake.CMAKE_BIN_DIR}/cmake", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout)
