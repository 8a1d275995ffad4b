"""NaN and infinity in every stored type: the same verdicts as ggml's own check, which writes to stderr."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from edgevlm import llama
from edgevlm.converters import finite, gguf_file, quant, tensor_types
from edgevlm.errors import CheckpointError
from edgevlm.gguf import _TENSOR_TYPES

BLOCKS = 60
KINDS = [gguf_file.type_name(number) for number in _TENSOR_TYPES]


def ggml_says(bits, kind):
    check = llama.library()._lib.ggml_validate_row_data
    check.restype, check.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return check(gguf_file.type_id(kind), bits.ctypes.data, bits.nbytes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_bytes_of_a_block_counts_as_it_does_for_ggml(kind):
    """Ones in all places, two bytes after two bytes: what is a scale shows, and nothing else does."""
    size = gguf_file.nbytes((gguf_file.block_size(kind),), kind)
    verdicts = []
    for place in range(-(-size // 2)):
        blocks_BS = np.zeros((BLOCKS, size), np.uint8)
        blocks_BS[BLOCKS - 1, 2 * place : 2 * place + 2] = 0xFF
        verdicts.append(finite.all_finite(blocks_BS, kind))
        assert verdicts[-1] == ggml_says(blocks_BS, kind), place
    assert False in verdicts or kind == "IQ1_M"  # whose one scale is spread over eight bytes
    assert kind in ("F16", "BF16", "F32", "MXFP4") or True in verdicts


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_count_as_they_do_for_ggml(monkeypatch, kind):
    random = np.random.default_rng(0)
    size = gguf_file.nbytes((gguf_file.block_size(kind),), kind)
    monkeypatch.setattr(finite, "_STEP", 2)
    found = set()
    for _ in range(400):  # about one scale of 32 is not finite
        blocks_BS = random.integers(0, 256, (5, size), np.uint8)
        found.add(finite.all_finite(blocks_BS, kind))
        assert finite.all_finite(blocks_BS, kind) == ggml_says(blocks_BS, kind)
    assert found == {False, True}


@pytest.mark.parametrize("kind", [kind for kind in tensor_types.TYPES if kind not in gguf_file.PLAIN_TYPES])
@pytest.mark.parametrize("largest", [1e9, 1e15, 1e25, 3e38])
def test_what_no_scale_can_hold_is_refused_in_our_words_alone(capfd, kind, largest):
    """From 1e15 on ggml aborts in IQ3_S, and stores zeros as Q6_K and Q3_K without a word."""
    rows_RD = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    assert len(quant.quantize_rows(rows_RD, kind, "w")) == gguf_file.nbytes((4, 512), kind)
    for row, factor in ((1, np.sign(rows_RD[1])), (2, np.float32(-1))):
        damaged_RD = rows_RD.copy()
        damaged_RD[row] = largest * factor
        with pytest.raises(CheckpointError, match=f"w holds .*, too much for {kind}") as caught:
            quant.quantize_rows(damaged_RD, kind, "w")
        assert caught.value.code == "checkpoint.overflow"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["IQ3_S", "IQ4_XS", "Q6_K"])
@pytest.mark.parametrize("largest", [1e5, 2.0**29])
def test_the_largest_importances_and_weights_do_not_abort(kind, largest):
    random = np.random.default_rng(0)
    rows_RD = random.normal(size=(6, 512)).astype(np.float32)
    rows_RD[1], rows_RD[2, 5], rows_RD[3] = largest * np.sign(rows_RD[1]), -largest, random.uniform(0, largest, 512)
    importance = (10.0 ** random.uniform(-30, 12, 512)).astype(np.float32)
    importance[:3] = 1e12
    if largest == 1e5:
        assert quant.quantize_rows(rows_RD, kind, "w", importance).any()
    else:
        with pytest.raises(CheckpointError):
            quant.quantize_rows(rows_RD, kind, "w", importance)
