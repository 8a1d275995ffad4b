"""Named changes to one weight on its way out of a checkpoint: pure functions on numpy arrays.

A family refers to them by name; `TRANSFORMS` is the list of names that it may use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import CheckpointError


def rope_interleave(weight_RD: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the rows of a Q or K projection from halves (Hugging Face) to pairs (llama.cpp's `llama`).

    Rotary embedding turns pairs of channels. Hugging Face pairs channel i of a head with i + half, llama.cpp pairs 2i
    with 2i + 1; the same rows in another order give the same attention. After `permute` in llama.cpp's
    `conversion/llama.py`. Works on any bit pattern, so bfloat16 as uint16 as well.

    Args:
        weight_RD: [heads * head_dim, n_embd], or a bias [heads * head_dim].
        heads: Query heads for Q, key/value heads for K.
    """
    rows = weight_RD.shape[0]
    halves = weight_RD.reshape(heads, 2, rows // heads // 2, *weight_RD.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_RD.shape)


#: Transforms by name, with the named size as their argument. Each only reorders rows (the first axis): a conversion
#: applies it to row numbers, so that no tensor is copied for it.
TRANSFORMS: dict[str, Callable[[NDArray[Any], int], NDArray[Any]]] = {"rope_interleave": rope_interleave}


def rope_factors_llama3(
    *, head_dim: int, base: float, factor: float, low: float, high: float, original_context: float
) -> NDArray[np.float32]:
    """Divisors of the rotary frequencies for `rope_type: llama3`, as llama.cpp's `rope_freqs.weight`.

    Long wavelengths are stretched by `factor`, short ones kept, and those between blended (Llama 3.1's
    `apply_scaling`; here in float64, rounded once).

    Returns:
        float32 [head_dim / 2].
    """
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / frequency
    smooth = (original_context / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    kept_or_blended = np.where(wavelength < original_context / high, 1.0, blended)
    return np.where(wavelength > original_context / low, factor, kept_or_blended).astype(np.float32)


def to_float16(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Round to float16, refusing weights that would become infinite.

    Raises:
        CheckpointError: `checkpoint.overflow`, with the largest magnitude.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if np.isinf(narrow).any():
        raise CheckpointError(
            f"{name} holds {np.abs(values).max():.6g}, F16 ends at 65504; convert with bf16 or f32",
            code="checkpoint.overflow",
        )
    return narrow


def to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, half to even, as the upper 16 bits. Values are finite (checked when read)."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def quantize_columns(weight_KN: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale for each output channel, safe from saturation on every CPU.

    x86 without VNNI multiplies unsigned activations (up to 255) by signed weights with VPMADDUBSW, which adds two
    neighbouring products into 16 bits and saturates beyond 32767. If two neighbours of one sign never exceed 128
    together, 255 * 128 = 32640 still fits: all CPUs then compute the same integers. Limiting the pairs rather than each
    weight (to 64, "7 bits") costs far less: on normally distributed weights the scale grows by about a fifth, not
    twofold.

    Args:
        weight_KN: [inputs, outputs].

    Returns:
        int8 [inputs, outputs] and float32 scales [outputs]; `weight ~ int8 * scale`.
    """
    inputs, outputs = weight_KN.shape
    padded = np.concatenate([weight_KN, np.zeros((inputs % 2, outputs), np.float32)])
    largest_N = np.zeros(outputs, np.float32)
    for sign in (1, -1):
        pairs = np.maximum(sign * padded, 0).reshape(-1, 2, outputs).sum(axis=1)
        np.maximum(largest_N, pairs.max(axis=0), out=largest_N)
    # 127 and not 128: rounding can add half to each of the two. A channel of zeros gets scale 1, as good as any.
    scale_N = np.where(largest_N > 0, largest_N / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight_KN / scale_N).astype(np.int8), scale_N


def quantize_blocks(weight_KN: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Signed 4 bits with one scale for each `block` inputs of an output channel, in the layout of MatMulNBits.

    A scale that maps the weight of largest magnitude to -8 uses all sixteen steps (as ggml's Q4_0). A slightly smaller
    or larger one often has less error, so nine are tried for each block and the best is kept.

    Args:
        weight_KN: [inputs, outputs]; inputs are padded with zeros to a multiple of `block`.
        block: Inputs that share a scale, even.

    Returns:
        uint8 [outputs, blocks, block / 2], two weights in each byte, the earlier in the low half, 8 more than their
        value; and float32 scales [outputs, blocks].
    """
    inputs, outputs = weight_KN.shape
    padded_NBK = np.zeros((outputs, -(-inputs // block) * block), np.float32)
    padded_NBK[:, :inputs] = weight_KN.T
    padded_NBK = padded_NBK.reshape(outputs, -1, block)
    index = np.abs(padded_NBK).argmax(axis=-1)[..., None]
    whole_NB1 = np.take_along_axis(padded_NBK, index, axis=-1) / np.float32(-8)
    best_NB1, least_NB1 = np.ones_like(whole_NB1), np.full_like(whole_NB1, np.inf)
    for factor in np.linspace(0.8, 1.2, 9, dtype=np.float32):
        scale_NB1 = np.where(whole_NB1 == 0, np.float32(1), whole_NB1 * factor)
        error_NB1 = ((_steps(padded_NBK, scale_NB1) * scale_NB1 - padded_NBK) ** 2).sum(axis=-1, keepdims=True)
        better = error_NB1 < least_NB1
        best_NB1, least_NB1 = np.where(better, scale_NB1, best_NB1), np.where(better, error_NB1, least_NB1)
    codes_NBK = (_steps(padded_NBK, best_NB1) + 8).astype(np.uint8)
    return codes_NBK[..., 0::2] | codes_NBK[..., 1::2] << 4, best_NB1[..., 0]


def _steps(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.rint(values / scale), -8, 7)
