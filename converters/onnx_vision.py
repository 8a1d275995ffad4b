"""Vision towers and connectors as ONNX graphs: fused operators of ONNX Runtime, built from declared weights.

One block (pre-norm), nine nodes; `h` is the residual stream and each SkipLayerNormalization closes one residual
branch and opens the next:

    n, h = SkipLayerNormalization(h, delta, ln1, bias of delta)
    q,k,v = Split(MatMul(n, Wqkv))                   biases are added inside the attention
    delta = MatMul(MultiHeadAttention(q, k, v, bias), Wo)
    n, h = SkipLayerNormalization(h, delta, ln2, bias of Wo)
    delta = MatMul(activation(MatMul(n, W1) + b1), W2)

With int8 weights, the products Wqkv, Wo, W1 and W2 are DynamicQuantizeMatMul; patch embedding, norms, attention and the
connector stay in float32. The connector reads the residual stream itself, without a norm: its few large channels would
stretch the one scale that an activation tensor has (measured: 0.043 relative error with it in int8, 0.013 without; no
other product matters as much).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.spec import Activation

EncoderQuant = Literal["fp32", "int8"]
#: Our name of a weight -> its values as float32.
Weights = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every layer function needs: the graph, the numbers, the weights and the wanted type."""

    graph: Graph
    vision: ResolvedVision
    tower: Weights
    connector: Weights
    quant: EncoderQuant

    def vector(self, name: str) -> Any:
        """A tower weight as it is."""
        return self.graph.weight(name, self.tower(name))

    def exact_product(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        """`x @ weight` in float32, with the arguments of `product`."""
        return self.graph.op.MatMul(x, self.graph.weight(name, weight_KN))

    def product(self, x: Any, name: str, weight_KN: NDArray[np.float32]) -> Any:
        """`x @ weight` in the wanted type.

        Args:
            x: [T, N, inputs].
            name: Name of the weight.
            weight_KN: [inputs, outputs].
        """
        if self.quant == "fp32":
            return self.exact_product(x, name, weight_KN)
        int8_KN, scale_N = self.graph.columns(weight_KN)
        return self.graph.op.DynamicQuantizeMatMul(
            x,
            self.graph.weight(f"{name}.int8", int8_KN),
            self.graph.weight(f"{name}.scale", scale_N),
        )


def build_encoder(path: Path, vision: ResolvedVision, tower: Weights, connector: Weights, quant: EncoderQuant) -> None:
    """Write `path` and `path` + `.data`: pixels_TCHW -> embeds_TND.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: a weight is not finite.
    """
    graph = Graph("encoder", path.with_name(path.name + ".data"))
    build_graph(graph, path, vision, tower, connector, quant)


def build_graph(
    graph: Graph, path: Path, vision: ResolvedVision, tower: Weights, connector: Weights, quant: EncoderQuant
) -> None:
    """The same with a graph that is given, and closed."""
    spec, image = vision.encoder, vision.image
    try:
        build = Build(graph=graph, vision=vision, tower=tower, connector=connector, quant=quant)
        pixels_TCHW = graph.input("pixels_TCHW", ["T", 3, image.height_px, image.width_px])
        with graph.scope("tower"):
            states_TND = TOWERS[spec.tower](build, pixels_TCHW)
        with graph.scope("connector"):
            embeds_TND = CONNECTORS[spec.connector](build, states_TND)
        graph.output(embeds_TND, "embeds_TND", ["T", spec.n_tokens, spec.n_embd])
        graph.save(path)
    finally:
        graph.close()


# towers


def siglip(build: Build, pixels_TCHW: Any) -> Any:
    """SigLIP: patches with positions, blocks, optionally the last norm. No class token."""
    op, graph = build.graph.op, build.graph
    patches_TND = _patches(build, pixels_TCHW, bias=True)
    embedded = op.Add(patches_TND, graph.weight("position.weight", build.tower("position.weight")))
    return _blocks(build, embedded)


def clip(build: Build, pixels_TCHW: Any) -> Any:
    """CLIP: class token first, patches without bias, positions, a norm, blocks.

    The class token is added to the first row of the position table, and the patches get an empty row in front: the sum
    is the same, without repeating the token for each tile.
    """
    op, graph = build.graph.op, build.graph
    patches_TND = _patches(build, pixels_TCHW, bias=False)
    padded = op.Pad(patches_TND, _int64(graph, "class.room", [0, 1, 0, 0, 0, 0]))
    position_ND = build.tower("position.weight")
    position_ND[0] += build.tower("class.weight")
    embedded = op.Add(padded, graph.weight("position.weight", position_ND))
    normed = op.LayerNormalization(
        embedded, build.vector("pre_norm.weight"), build.vector("pre_norm.bias"),
        axis=-1, epsilon=build.vision.encoder.layer_norm_eps,
    )  # fmt: skip
    return _blocks(build, normed)


def _patches(build: Build, pixels_TCHW: Any, *, bias: bool) -> Any:
    """Non-overlapping patches through one product: [T, 3, H, W] -> [T, patches, hidden], row-major."""
    op, graph, spec = build.graph.op, build.graph, build.vision.encoder
    patch = spec.patch_px
    biases = (build.vector("patch.bias"),) if bias else ()
    maps_TDHW = op.Conv(
        pixels_TCHW, build.vector("patch.weight"), *biases, kernel_shape=[patch, patch], strides=[patch, patch]
    )
    flat_TDN = op.Reshape(maps_TDHW, _int64(graph, "flat", [0, spec.hidden, -1]))
    return op.Transpose(flat_TDN, perm=[0, 2, 1])


def _blocks(build: Build, embedded: Any) -> Any:
    """Run the blocks, close the last residual branch, and keep the selected positions."""
    op, graph, spec = build.graph.op, build.graph, build.vision.encoder
    residual, delta, delta_bias = embedded, None, None
    for i in range(spec.layers):
        with graph.scope(f"blk.{i}"):
            residual, delta, delta_bias = _block(build, i, residual, delta, delta_bias)
    states = residual if delta is None else op.Add(op.Add(delta, delta_bias), residual)
    if spec.post_norm:
        states = op.LayerNormalization(
            states, build.vector("post_norm.weight"), build.vector("post_norm.bias"),
            axis=-1, epsilon=spec.layer_norm_eps,
        )  # fmt: skip
    if not build.vision.cut_first:
        return states
    to_the_end = _int64(graph, "cut.end", [2**31])
    return op.Slice(states, _int64(graph, "cut.start", [1]), to_the_end, _int64(graph, "cut.axis", [1]))


def _block(build: Build, i: int, residual: Any, delta: Any, delta_bias: Any) -> tuple[Any, Any, Any]:
    """One block. Returns the residual stream, and the open branch with its bias, which the next norm adds."""
    op, graph, spec = build.graph.op, build.graph, build.vision.encoder

    def weight(leaf: str) -> NDArray[np.float32]:
        return build.tower(f"blk.{i}.{leaf}")

    normed, residual = _skip_norm(build, "ln1", i, residual, delta, delta_bias)
    qkv_KN = np.concatenate([weight(f"{part}.weight") for part in "qkv"]).T
    qkv = build.product(normed, "qkv.weight", qkv_KN)
    q, k, v = op.Split(qkv, axis=-1, _outputs=3)
    qkv_bias = graph.weight("qkv.bias", np.concatenate([weight(f"{part}.bias") for part in "qkv"]))
    # scale defaults to 1 / sqrt(head width), which is also CLIP's and SigLIP's
    attended = op.MultiHeadAttention(q, k, v, qkv_bias, num_heads=spec.heads)
    delta = build.product(attended, "o.weight", weight("o.weight").T)
    normed, residual = _skip_norm(build, "ln2", i, residual, delta, graph.weight("o.bias", weight("o.bias")))
    hidden = build.product(normed, "fc1.weight", weight("fc1.weight").T)
    hidden = _biased_activation(graph, hidden, "fc1.bias", weight("fc1.bias"), spec.activation)
    delta = build.product(hidden, "fc2.weight", weight("fc2.weight").T)
    return residual, delta, graph.weight("fc2.bias", weight("fc2.bias"))


def _skip_norm(build: Build, norm: str, i: int, residual: Any, delta: Any, delta_bias: Any) -> tuple[Any, Any]:
    """(norm(residual + delta + bias), residual + delta + bias); the very first norm has no branch to close."""
    op, graph, epsilon = build.graph.op, build.graph, build.vision.encoder.layer_norm_eps
    gamma = graph.weight(f"{norm}.weight", build.tower(f"blk.{i}.{norm}.weight"))
    beta = graph.weight(f"{norm}.bias", build.tower(f"blk.{i}.{norm}.bias"))
    if delta is None:
        return op.LayerNormalization(residual, gamma, beta, axis=-1, epsilon=epsilon), residual
    normed, _mean, _inverse, total = op.SkipLayerNormalization(
        delta, residual, gamma, beta, delta_bias, epsilon=epsilon, _outputs=4
    )
    return normed, total


def _biased_activation(graph: Graph, x: Any, name: str, bias: NDArray[np.float32], kind: Activation) -> Any:
    """activation(x + bias). FastGelu is the tanh form, BiasGelu the exact one, QuickGelu x * sigmoid(1.702 x)."""
    op, bias_value = graph.op, graph.weight(name, bias)
    if kind == "gelu_tanh":
        return op.FastGelu(x, bias_value)
    if kind == "gelu":
        return op.BiasGelu(x, bias_value)
    return op.QuickGelu(op.Add(x, bias_value), alpha=1.702)


# connectors


def mlp(build: Build, states_TND: Any) -> Any:
    """Two linear layers with an activation between them, always float32."""
    graph, spec = build.graph, build.vision.encoder
    has_bias = build.vision.connector_bias
    zeros = np.zeros(spec.n_embd, np.float32)
    hidden = build.exact_product(states_TND, "fc1.weight", build.connector("fc1.weight").T)
    bias = build.connector("fc1.bias") if has_bias else zeros
    hidden = _biased_activation(graph, hidden, "fc1.bias", bias, spec.connector_activation)
    embeds = build.exact_product(hidden, "fc2.weight", build.connector("fc2.weight").T)
    return graph.op.Add(embeds, graph.weight("fc2.bias", build.connector("fc2.bias"))) if has_bias else embeds


def linear(build: Build, states_TND: Any) -> Any:
    """One linear layer, always float32."""
    product = build.exact_product(states_TND, "fc1.weight", build.connector("fc1.weight").T)
    return build.graph.op.Add(product, build.graph.weight("fc1.bias", build.connector("fc1.bias")))


def pixel_shuffle(build: Build, states_TND: Any) -> Any:
    """Squares of `scale_factor` x `scale_factor` patches side by side in one row, then one product, always float32.

    With a grid of g x g patches of width D, s = `scale_factor` and q = g / s, the axes of the grid are (square's row,
    row within it, square's column, column within it), and the two middle ones are exchanged:

        [T, g * g, D] -> [T, q, s, q, s * D] -> [T, q, q, s, s * D] -> [T, q * q, s * s * D]
    """
    op, graph, spec = build.graph.op, build.graph, build.vision.encoder
    side, factor = int((spec.n_tokens * spec.scale_factor**2) ** 0.5), spec.scale_factor
    squares = side // factor
    split = op.Reshape(states_TND, _int64(graph, "split", [0, squares, factor, squares, factor * spec.hidden]))
    grouped = op.Transpose(split, perm=[0, 1, 3, 2, 4])
    features = op.Reshape(grouped, _int64(graph, "join", [0, spec.n_tokens, factor * factor * spec.hidden]))
    return build.exact_product(features, "fc1.weight", build.connector("fc1.weight").T)


def _int64(graph: Graph, name: str, numbers: list[int]) -> Any:
    return graph.weight(name, np.array(numbers, np.int64))


TOWERS: dict[str, Callable[[Build, Any], Any]] = {"siglip": siglip, "clip": clip}
CONNECTORS: dict[str, Callable[[Build, Any], Any]] = {
    "mlp": mlp,
    "linear": linear,
    "pixel_shuffle": pixel_shuffle,
}
