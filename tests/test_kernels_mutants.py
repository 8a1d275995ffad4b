"""Seeded bugs: the checks of the kernels fail when a kernel is wrong.

A mutant is the source with one textual change. `kernels_check` has to find those in the targets and in what the targets
share; Pillow those in the definition, which every target follows; the sanitizers those that change no pixel.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from native import REPOSITORY, SANITIZERS, cmake_build

pytestmark = pytest.mark.slow

PILLOW_CHECK = Path(__file__).with_name("pillow_check.py")


class Mutant(NamedTuple):
    """The first `before` in `file` becomes `after`."""

    idea: str
    file: str
    before: str
    after: str


CHECKED = [
    Mutant("tile row", "resize.c", "y % sink->tile_height * sink->tile_width", "y % sink->tile_height"),
    Mutant("pass order", "resize.c", "lost_rows > 2 * lost_columns", "lost_rows >= 2 * lost_columns"),
    Mutant("ring too small", "resize.c", "(size_t)axis->n_taps + RESIZE_BATCH", "(size_t)axis->n_taps"),
    Mutant("border row", "resize.c", "y < (size_t)source->top", "y <= (size_t)source->top"),
    Mutant("plane", "scalar.c", "dst + c * plane, n_pixels, 3)", "dst + c * n_pixels, n_pixels, 3)"),
    Mutant("dropped sample", "resize.c", "row + i * job->samples, channels", "row + i * channels, channels"),
    Mutant("row of a band", "resize.c", "y < sink->end_row", "y < sink->end_row - 1"),
    Mutant("CPU not asked", "dispatch.c", "if (!runs_on(targets[last], features))", "if (false)"),
]
UNSEEN = [
    Mutant("sample that is not there", "resize.c", "n_bytes - 1);", "n_bytes);"),
    Mutant("leak", "resize.c", "free(job->canvas_rows);", ""),
    Mutant("scratch too small", "attention.c", "return finite + ATTENTION_ALIGNMENT", "return finite"),
    Mutant("overflow", "coeffs.c", "w * (1 << RESIZE_WEIGHT_BITS)", "w * (1L << (RESIZE_WEIGHT_BITS + 10))"),
]
if platform.machine() == "x86_64":
    CHECKED += [
        Mutant("rounding", "avx2.c", "1 << (RESIZE_WEIGHT_BITS - 1)", "1 << RESIZE_WEIGHT_BITS"),
        Mutant("no clip", "avx2.c", "_mm256_packus_epi16(", "_mm256_packs_epi16("),
        Mutant("odd tap", "avx2.c", "t + 1 < n_taps ? t + 1 : t", "t"),
        Mutant("digit", "avx512.c", "_mm512_slli_epi32(sums[2], 16)", "_mm512_slli_epi32(sums[2], 15)"),
        Mutant("last column", "lanes_x86.h", "columns(src_rows, scratch, n_taps, dst_row, n_bytes - block)", ""),
        Mutant("plane", "avx2.c", "_mm_set1_epi8(0x70)", "_mm_set1_epi8(0x60)"),
        Mutant("chroma", "frames_avx2.c", "_mm256_srai_epi32(low, 15)", "_mm256_srai_epi32(low, 14)"),
        Mutant("alpha", "frames_avx2.c", "_mm256_set1_epi16(128)", "_mm256_set1_epi16(127)"),
        Mutant("tap", "lanes.h", "g * format->taps + t - shift", "g * format->taps + t + 1 - shift"),
        Mutant("write behind a row", "lanes_x86.h", "i + 2 < plan->n_out", "i + 1 < plan->n_out"),
        Mutant("moved keys", "attention_avx512.c", "-KEY_MOVED * query_sums[r]", "KEY_MOVED * query_sums[r]"),
        Mutant("order of weights", "attention_avx512.c", "(j) / 16 % 2 * 4", "(j) / 16 % 2 * 0"),
        Mutant("small weights", "attention_avx2.c", "_mm256_set1_ps(-24.0f)", "_mm256_set1_ps(-4.0f)"),
        Mutant("groups", "lanes.h", "(shift + count + format->taps - 1) / format->taps", "count / format->taps"),
    ]
    UNSEEN += [
        Mutant("read behind a row", "lanes.h", "(n_bytes - load_bytes) /", "n_bytes /"),
        Mutant(
            "plan too small",
            "lanes.h",
            "n_steps * (LANES_STEP / format->taps)",
            "(n_steps - 1) * (LANES_STEP / format->taps)",
        ),
    ]
#: Of arm64; elsewhere tests/arm64/compare.py runs them in emulation.
ARM64 = [
    Mutant("rounding", "neon.c", "1 << (RESIZE_WEIGHT_BITS - 1 - 16)", "1 << (RESIZE_WEIGHT_BITS - 16)"),
    Mutant("carry", "neon.c", "vsubw_s16(w, low)", "w"),
    Mutant("wide groups", "neon.c", "(end + TAPS - 1) / TAPS", "end / TAPS"),
    Mutant("pair of three", "neon.c", "count % TAPS <= 2", "count % TAPS <= 3"),
    Mutant("digit", "dotprod.c", "vrshrq_n_s32(w1, 8)", "vshrq_n_s32(w1, 8)"),
    Mutant("moved by", "dotprod.c", "128u * ", "127u * "),
    Mutant("last sample", "lanes_neon.h", "memcpy(row, cut, n_bytes - at)", "memcpy(row, cut, n_bytes - at - 1)"),
    Mutant("last rows", "lanes_neon.h", "(n_taps - 1) / 4 * 4 + k", "n_taps / 4 * 4 + k"),
    Mutant("moved values", "attention_dotprod.c", "VALUE_MOVED * sums", "127 * sums"),
    Mutant("upper byte", "attention_dotprod.c", "vshrn_n_u16(both, 8)", "vshrn_n_u16(both, 7)"),
    Mutant(
        "second half", "attention_neon.c", "vmlal_high_n_s16(parts[r][1], x, w)", "vmlal_high_n_s16(parts[r][1], x, 1)"
    ),
    Mutant("small weights", "attention_neon.h", "vdupq_n_f32(-24.0f)", "vdupq_n_f32(-4.0f)"),
    Mutant("chroma", "frames_neon.c", "vsraq_n_s32(high, low, 15)", "vsraq_n_s32(high, low, 14)"),
    Mutant("alpha", "frames_neon.c", "vraddhn_u16(x, ", "vaddhn_u16(x, "),
]
if platform.machine() in ("aarch64", "arm64"):
    CHECKED += ARM64
DEFINITIONS = [
    Mutant("rounding", "scalar.c", "1 << (RESIZE_WEIGHT_BITS - 1)", "0"),
    Mutant("no clip", "scalar.c", "value > 255 ? 255 : value", "value"),
    Mutant("negative weights", "coeffs.c", "w < 0 ? -0.5 : 0.5", "0.5"),
    Mutant("last tap", "coeffs.c", "center + support + 0.5", "center + support"),
    Mutant("bicubic", "coeffs.c", "1.5 * x - 2.5", "1.5 * x - 2.4"),
    Mutant("half a pixel", "coeffs.c", "origin + i + 0.5", "origin + i"),
    Mutant("pass order", "resize.c", "lost_rows > 2 * lost_columns", "lost_rows >= 2 * lost_columns"),
]


def named(mutants: list[Mutant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutant", mutants, ids=[f"{mutant.file}-{mutant.idea}" for mutant in mutants])


class Workshop:
    """A copy of the sources that is damaged, built and repaired; only what changed is compiled.

    Args:
        toolchain: Of another machine, see `cmake_build`;
        emulator: and the command that runs its programs.
    """

    def __init__(
        self, folder: Path, c_flags: str, *, toolchain: Path | None = None, emulator: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.c_flags, self.toolchain, self.emulator = folder, c_flags, toolchain, emulator
        shutil.copytree(REPOSITORY / "kernels", folder / "kernels")
        shutil.copy(REPOSITORY / "CMakeLists.txt", folder)

    def run(self, target: str, mutant: Mutant | None = None) -> subprocess.CompletedProcess[str]:
        """What the check that belongs to `target` says of the mutant, or of the sources as they are."""
        if mutant is None:
            return self._run(target)
        path = self.folder / "kernels" / mutant.file
        source = path.read_text()
        assert mutant.before in source, "the source has changed: so must the mutant"
        path.write_text(source.replace(mutant.before, mutant.after, 1))
        try:
            return self._run(target)
        finally:
            path.write_text(source)

    def _run(self, target: str) -> subprocess.CompletedProcess[str]:
        cmake_build(self.folder, self.folder / "build", target, self.c_flags, toolchain=self.toolchain)
        if target == "kernels_check":
            command = [*self.emulator, self.folder / "build" / target]
        else:
            command = [sys.executable, PILLOW_CHECK, self.folder / "build" / "_kernels.abi3.so"]
        return subprocess.run(command, capture_output=True, text=True)


def assert_found(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert "differs" in done.stdout or "selected wrongly" in done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("plain"), "-O1")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("sanitized"), f"-O1 {SANITIZERS}")


@pytest.mark.parametrize("target", ["kernels_check", "_kernels"])
def test_the_sources_as_they_are_pass(plain: Workshop, target: str) -> None:
    done = plain.run(target)
    assert done.returncode == 0, done.stdout + done.stderr


@named(CHECKED)
def test_kernels_check_finds(plain: Workshop, mutant: Mutant) -> None:
    assert_found(plain.run("kernels_check", mutant))


@named(DEFINITIONS)
def test_pillow_finds(plain: Workshop, mutant: Mutant) -> None:
    done = plain.run("_kernels", mutant)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


@named(UNSEEN)
def test_sanitizers_find(sanitized: Workshop, mutant: Mutant) -> None:
    done = sanitized.run("kernels_check", mutant)
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr or "runtime error" in done.stderr, done.stdout
