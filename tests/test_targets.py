"""`decoder_quant="auto"`: what is chosen follows from the CPU and the model's sizes, and the reason says so."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import tiny
from tiny import Variant

from edgevlm import llama
from edgevlm.converters import DEVICES, convert
from edgevlm.converters.targets import TARGETS, choose, detect
from edgevlm.errors import UsageError
from edgevlm.llama import enabled_features

LLAMA_1B = {"token_embd.weight": (128256, 2048), "blk.0.ffn_down.weight": (2048, 8192)}
SMOLLM2_135M = {"token_embd.weight": (49152, 576), "blk.0.ffn_down.weight": (576, 1536)}
ODD = {"token_embd.weight": (512, 36)}

# As llama.cpp prints them: this kind of machine, a Raspberry Pi 4, a Raspberry Pi 5, an Apple M2.
INFO = {
    "x86": "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | AVX512 = 0 | LLAMAFILE = 1 | REPACK = 1 | ",
    "pi4": "CPU : NEON = 1 | ARM_FMA = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | ",
    "pi5": "CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | ",
    "apple": "CPU : NEON = 1 | ARM_FMA = 1 | MATMUL_INT8 = 1 | DOTPROD = 1 | ACCELERATE = 1 | REPACK = 1 | ",
}


@pytest.mark.parametrize("device", TARGETS)
def test_each_device_and_size(device):
    choice = choose(device, LLAMA_1B)
    assert choice.recipe.name == "q4_k_m"
    assert TARGETS[device].says in choice.reason
    assert ("for no type" in choice.reason) == (device == "pi4")
    # Rows of 576 = 2.25 blocks of 256: llama.cpp would store Q5_0, larger and without a repacked kernel.
    narrow = choose(device, SMOLLM2_135M)
    assert narrow.recipe.name == "iq4_nl"
    assert "256" in narrow.reason
    assert choose(device, ODD).recipe.name == "f16"


def test_a_few_rows_that_do_not_fit_do_not_decide():
    mostly = {"blk.0.ffn_up.weight": (4096, 1024), "blk.0.ffn_down.weight": (96, 4000)}
    assert choose("x86", mostly).recipe.name == "q4_k_m"
    assert choose("x86", {**mostly, "blk.1.ffn_down.weight": (1024, 4000)}).recipe.name == "iq4_nl"


@pytest.mark.parametrize("device", INFO)
def test_the_cpu_is_known_by_what_llama_cpp_says(device):
    assert detect(enabled_features(INFO[device])).repacked == TARGETS[device].repacked
    without = INFO[device].replace("REPACK = 1", "REPACK = 0")
    assert detect(enabled_features(without)).repacked == frozenset()


def test_this_machine():
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    assert "REPACK" in llama.cpu_features()
    if "avx2" in flags:
        assert choose("this", LLAMA_1B) == choose("x86", LLAMA_1B)


def test_the_choice_is_reported_recorded_and_made(tmp_path):
    lines = []
    manifest = convert(
        tiny.shared(Variant())[0], tmp_path / "out", decoder_quant="AUTO", device="x86", report=lines.append
    )
    arguments = manifest.provenance["arguments"]
    assert arguments["decoder_quant"] == "iq4_nl"  # rows of 64
    assert arguments["decoder_quant_auto"] == {
        "device": "x86",
        "reason": "x86 with AVX2 has repacked kernels for IQ4_NL, and iq4_nl fits this model's rows, which are no "
        "multiples of 256 as Q4_K needs",
    }
    assert any(arguments["decoder_quant_auto"]["reason"] in line for line in lines)
    assert set(manifest.fidelity["decoder"]["types"]) <= {"F32", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0"}


def test_devices_that_are_unknown_or_mean_nothing(tmp_path):
    folder, _ = tiny.shared(Variant())
    with pytest.raises(UsageError, match=", ".join(DEVICES)):
        convert(folder, tmp_path / "out", decoder_quant="auto", device="pi3")
    with pytest.raises(UsageError, match="only `auto` chooses by device"):
        convert(folder, tmp_path / "out", decoder_quant="q8_0", device="pi4")
