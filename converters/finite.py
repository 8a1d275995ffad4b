"""Whether stored numbers are finite, in every type that a GGUF file may have.

ggml has this check as well, but writes what it finds to stderr, behind its log's back: nothing of a library may reach
the user's terminal. The positions of the scales are those of the structs in ggml's `ggml-common.h`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import gguf_file

#: Weights, or blocks, that are looked at in one go.
_STEP = 1 << 18
# Type -> its bits as whole numbers, and those of the exponent: all ones there are infinity or NaN.
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000), "F16": (np.dtype("<u2"), 0x7C00), "BF16": (np.dtype("<u2"), 0x7F80),
}  # fmt: skip
# Type -> where in a block its float16 scales and offsets lie.
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
_IQ1_M_SCALES = 48  # four uint16, each with four bits of the block's float16 on top; the first has the lowest


def all_finite(bits: NDArray[Any], kind: str) -> bool:
    """Whether no number is NaN or infinite; of blocks, whether no scale is.

    Args:
        bits: As stored, contiguous: of F32, F16 and BF16 items or bytes, of all other types bytes, whole blocks.
        kind: A ggml type that llama.cpp can multiply with.
    """
    if kind in _EXPONENTS:
        unsigned, _ = _EXPONENTS[kind]
        flat = bits.reshape(-1).view(unsigned)
        return all(_plain_finite(flat[start : start + _STEP], kind) for start in range(0, len(flat), _STEP))
    blocks_BS = bits.reshape(-1, gguf_file.nbytes((gguf_file.block_size(kind),), kind))
    return all(_blocks_finite(blocks_BS[start : start + _STEP], kind) for start in range(0, len(blocks_BS), _STEP))


def _plain_finite(whole: NDArray[Any], kind: str) -> bool:
    unsigned, exponent = _EXPONENTS[kind]
    return not ((whole & unsigned.type(exponent)) == exponent).any()


def _blocks_finite(blocks_BS: NDArray[np.uint8], kind: str) -> bool:
    if kind == "MXFP4":
        return not (blocks_BS[:, 0] == 0xFF).any()  # E8M0: a power of two, of which one stands for NaN
    if kind == "IQ1_M":
        parts_B4 = np.ascontiguousarray(blocks_BS[:, _IQ1_M_SCALES : _IQ1_M_SCALES + 8]).view("<u2")
        joined_B = (parts_B4 >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, dtype=np.uint16)
        return _plain_finite(joined_B, "F16")
    return all(_plain_finite(_halves(blocks_BS, offset), "F16") for offset in _SCALES[kind])


def _halves(blocks_BS: NDArray[np.uint8], offset: int) -> NDArray[Any]:
    return np.ascontiguousarray(blocks_BS[:, offset : offset + 2]).view("<u2")
