"""The products of an encoder, `x @ weight`, and its attention, in the forms that ONNX Runtime computes on a CPU.

fp32    MatMul
fp16    MatMul of weights that are stored as float16 and widened when the graph is loaded: half the file, same speed
int8    DynamicQuantizeMatMul: one scale for each output channel, one for all activations, found while running
int4    MatMulNBits: one scale for each 32 weights of an output channel; activations as int8 with a scale for each 32

docs/conversion.md says how fast they are and what they lose. int8 is the fastest by far, and the one that outliers
hurt: a channel of activations that is much larger than the others stretches the one scale. What is done about it, a
product's `Treatment`, is decided by measurement (smoothing.py).

Attention is float32, and for int8 in integers as well, by an operator of our own (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.transforms import to_float16

EncoderQuant = Literal["fp32", "fp16", "int8", "int4"]

INT4_BLOCK = 32
#: Channels of a head that our attention takes.
_MOST_WIDTH = 256
#: Rows of activations that are kept of each picture, and columns of each weight, to estimate errors on.
SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 64


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What one int8 product, or attention, gets to lose less.

    Attributes:
        exact: It stays in float32.
        smooth_K: float32 [inputs]; whatever makes its input divides channel k by smooth_K[k], and row k of its weight
            is multiplied with it. The product is the same, but quantized more evenly (SmoothQuant, arXiv 2211.10438).
    """

    exact: bool = False
    smooth_K: NDArray[np.float32] | None = None


PLAIN = Treatment()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Of a weight, enough to estimate what a treatment does: some columns, and each row's largest magnitude."""

    columns_KN: NDArray[np.float32]
    largest_K: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Products:
    """Adds products to a graph.

    Attributes:
        graph: Where to.
        quant: The form of all products that have no other treatment.
        treatments: By the full name of a product or attention, `tower.blk.0.qkv`, `tower.blk.0.attention`; only int8
            asks.
        probes: If not None, every product also puts a sample of its weight here, and the graph gets three outputs:
            NAME.rows, some rows of the product's input, NAME.low and NAME.high, the smallest and largest value of
            each of its channels. Of every attention NAME.difference and NAME.reference are the sum of squares of what
            it loses in integers, and of its result.
        positions: Tokens of a picture inside the tower, for `probes`.
    """

    graph: Graph
    quant: EncoderQuant
    treatments: Mapping[str, Treatment] = field(default_factory=dict)
    probes: dict[str, Sample] | None = None
    positions: int = 1

    def smoothing(self, name: str) -> NDArray[np.float32] | np.float32:
        """What the input of product `name` must be divided by, channel by channel."""
        factors_K = self._treatment(name).smooth_K
        return np.float32(1) if factors_K is None else factors_K

    def exact(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        """`x @ weight` with float32 activations and weights, whatever the form of the others; fp16 stores it so.

        Args:
            x: [T, N, inputs].
            name: Name of the product in its scope.
            weight_KN: [inputs, outputs].
        """
        return self.graph.op.MatMul(x, self.stored(f"{name}.weight", weight_KN))

    def stored(self, name: str, weight: NDArray[np.float32]) -> Any:
        """A large weight that is computed with in float32."""
        if self.quant != "fp16":
            return self.graph.weight(name, weight)
        narrow = self.graph.weight(f"{name}.fp16", to_float16(weight, self.graph.full_name(name)))
        return self.graph.op.Cast(narrow, to=1)  # float32; done once, when the graph is loaded

    def product(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        """`x @ weight` in the wanted form, with the arguments of `exact`."""
        if self.probes is not None:
            self._probe(x, name, weight_KN)
        treatment = self._treatment(name)
        if treatment.smooth_K is not None:
            weight_KN = weight_KN * treatment.smooth_K[:, None]
        if self.quant in ("fp32", "fp16") or treatment.exact:
            return self.exact(x, name, weight_KN)
        return self._int8(x, name, weight_KN) if self.quant == "int8" else self._int4(x, name, weight_KN)

    def attention(self, qkv: Any, bias: Any, hidden: int, heads: int) -> Any:
        """Attention of all tokens to all tokens, scaled by 1 / sqrt(width of a head), as CLIP and SigLIP have it.

        Args:
            qkv: [T, N, 3 * hidden], queries, keys and values behind each other.
            bias: [3 * hidden], added to them.
            hidden, heads: Channels of each, and how many heads they make.
        """
        op, name = self.graph.op, "attention"
        if self.quant == "int8" and not self._treatment(name).exact and hidden // heads <= _MOST_WIDTH:
            return op.QkvAttention(qkv, bias, num_heads=heads)
        q, k, v = op.Split(qkv, axis=-1, _outputs=3)
        attended = op.MultiHeadAttention(q, k, v, bias, num_heads=heads)
        if self.probes is not None and hidden // heads <= _MOST_WIDTH:
            found = op.QkvAttention(qkv, bias, num_heads=heads)
            full = self.graph.full_name(name)
            for part, value in (("difference", op.Sub(found, attended)), ("reference", attended)):
                self.graph.output(op.ReduceSumSquare(value, keepdims=0), f"{full}.{part}", [])
        return attended

    def _int8(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        int8_KN, scale_N = self.graph.columns(weight_KN)
        weight = self.graph.weight(f"{name}.weight.int8", int8_KN)
        return self.graph.op.DynamicQuantizeMatMul(x, weight, self.graph.weight(f"{name}.weight.scale", scale_N))

    def _int4(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        packed, scale_NB = self.graph.blocks(weight_KN, INT4_BLOCK)
        inputs, outputs = weight_KN.shape
        return self.graph.op.MatMulNBits(
            x,
            self.graph.weight(f"{name}.weight.int4", packed),
            self.graph.weight(f"{name}.weight.scale", scale_NB.reshape(-1)),
            K=inputs, N=outputs, bits=4, block_size=INT4_BLOCK, accuracy_level=4,
        )  # fmt: skip

    def _treatment(self, name: str) -> Treatment:
        return self.treatments.get(self.graph.full_name(name), PLAIN)

    def _probe(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> None:
        assert self.probes is not None
        full, inputs = self.graph.full_name(name), len(weight_KN)
        step = max(1, weight_KN.shape[1] // SAMPLED_COLUMNS)
        self.probes[full] = Sample(columns_KN=weight_KN[:, ::step].copy(), largest_K=np.abs(weight_KN).max(axis=1))
        op, integers = self.graph.op, self.graph.integers
        stride = max(1, self.positions // SAMPLED_ROWS)
        rows = op.Slice(
            x, integers(f"{name}.probe.start", [stride // 2]), integers(f"{name}.probe.end", [2**31]),
            integers(f"{name}.probe.axis", [1]), integers(f"{name}.probe.step", [stride]),
        )  # fmt: skip
        self.graph.output(rows, f"{full}.rows", ["T", "rows", inputs])
        self.graph.output(op.ReduceMin(x, axes=[0, 1], keepdims=0), f"{full}.low", [inputs])
        self.graph.output(op.ReduceMax(x, axes=[0, 1], keepdims=0), f"{full}.high", [inputs])
