"""Vision towers and connectors as ONNX graphs: fused operators of ONNX Runtime, built from declared weights.

One block (pre-norm), nine nodes; `h` is the residual stream and each SkipLayerNormalization closes one residual
branch and opens the next:

    n, h = SkipLayerNormalization(h, delta, ln1, bias of delta)
    q,k,v = Split(MatMul(n, Wqkv))                   biases are added inside the attention
    delta = MatMul(MultiHeadAttention(q, k, v, bias), Wo)
    n, h = SkipLayerNormalization(h, delta, ln2, bias of Wo)
    delta = MatMul(activation(MatMul(n, W1) + b1), W2)

The products Wqkv, Wo, W1 and W2 take the wanted form (onnx_products.py), and with int8 one operator takes the place of
Split and MultiHeadAttention; patch embedding, norms and the connector stay in float32. The connector reads the residual
stream itself, without a norm: its few large channels would stretch the one scale that an activation tensor has in int8
(measured: 0.043 relative error with it in int8, 0.013 without; no other product matters as much).

An int8 product may be smoothed: the norm before Wqkv and W1 then divides its channels by the factors, and V, with its
bias, the channels that Wo reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.onnx_products import EncoderQuant, Products, Sample, Treatment
from edgevlm.converters.onnx_resampler import resampler, strip_table
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.spec import Activation

#: Our name of a weight -> its values as float32.
Weights = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every layer function needs: the graph, the numbers, the weights, and products in the wanted form."""

    graph: Graph
    vision: ResolvedVision
    tower: Weights
    connector: Weights
    products: Products
    pixels_TCHW: Any

    def vector(self, name: str) -> Any:
        """A tower weight as it is."""
        return self.graph.weight(name, self.tower(name))


def build_encoder(
    path: Path,
    vision: ResolvedVision,
    tower: Weights,
    connector: Weights,
    quant: EncoderQuant,
    *,
    treatments: Mapping[str, Treatment] | None = None,
    probes: dict[str, Sample] | None = None,
    graph: Graph | None = None,
) -> None:
    """Write `path` and `path` + `.data`: pixels_TCHW -> embeds_TND.

    Args:
        path: Must not exist.
        vision: All sizes.
        tower, connector: Their weights.
        quant: The form of the products in the blocks.
        treatments, probes: See `Products`.
        graph: An empty one to use, such as a `MeasuredGraph`, which writes nothing; it is closed.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: a weight is not finite, or beyond float16's range for `fp16`.
    """
    graph = graph or Graph("encoder", path.with_name(path.name + ".data"))
    spec, image = vision.encoder, vision.image
    try:
        products = Products(
            graph=graph, quant=quant, treatments=treatments or {}, probes=probes, positions=usual_tokens(vision)
        )
        size: list[int | str] = ["H", "W"] if image.policy == "slices" else [image.height_px, image.width_px]
        pixels_TCHW = graph.input("pixels_TCHW", ["T", 3, *size])
        build = Build(
            graph=graph, vision=vision, tower=tower, connector=connector, products=products, pixels_TCHW=pixels_TCHW
        )
        with graph.scope("tower"):
            states_TND = TOWERS[spec.tower](build, pixels_TCHW)
        with graph.scope("connector"):
            embeds_TND = CONNECTORS[spec.connector](build, states_TND)
        graph.output(embeds_TND, "embeds_TND", ["T", spec.n_tokens, spec.n_embd])
        graph.save(path)
    finally:
        graph.close()


def usual_tokens(vision: ResolvedVision) -> int:
    """Tokens inside the tower of a picture, or of a usual one where their number depends on it."""
    if vision.image.policy != "slices":
        return vision.positions
    patch_px = vision.encoder.patch_px
    return (vision.image.height_px // patch_px) * (vision.image.width_px // patch_px)


# towers


def siglip(build: Build, pixels_TCHW: Any) -> Any:
    """SigLIP: patches with positions, blocks, optionally the last norm. No class token."""
    op, graph = build.graph.op, build.graph
    patches_TND = _patches(build, pixels_TCHW, bias=True)
    embedded = op.Add(patches_TND, graph.weight("position.weight", build.tower("position.weight")))
    return _blocks(build, embedded)


def siglip_strip(build: Build, pixels_TCHW: Any) -> Any:
    """SigLIP for pictures of any size, with the positions that MiniCPM-Llama3-V 2.5 gives their patches."""
    patches_TND = _patches(build, pixels_TCHW, bias=True)
    return _blocks(build, build.graph.op.Add(patches_TND, strip_table(build)))


def clip(build: Build, pixels_TCHW: Any) -> Any:
    """CLIP: class token first, patches without bias, positions, a norm, blocks.

    The class token is added to the first row of the position table, and the patches get an empty row in front: the sum
    is the same, without repeating the token for each tile.
    """
    op, graph = build.graph.op, build.graph
    patches_TND = _patches(build, pixels_TCHW, bias=False)
    padded = op.Pad(patches_TND, graph.integers("class.room", [0, 1, 0, 0, 0, 0]))
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
    weight = build.products.stored("patch.weight", build.tower("patch.weight"))
    maps_TDHW = op.Conv(pixels_TCHW, weight, *biases, kernel_shape=[patch, patch], strides=[patch, patch])
    flat_TDN = op.Reshape(maps_TDHW, graph.integers("flat", [0, spec.hidden, -1]))
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
    to_the_end = graph.integers("cut.end", [2**31])
    return op.Slice(states, graph.integers("cut.start", [1]), to_the_end, graph.integers("cut.axis", [1]))


def _block(build: Build, i: int, residual: Any, delta: Any, delta_bias: Any) -> tuple[Any, Any, Any]:
    """One block. Returns the residual stream, and the open branch with its bias, which the next norm adds."""
    graph, spec = build.graph, build.vision.encoder

    def weight(leaf: str) -> NDArray[np.float32]:
        return build.tower(f"blk.{i}.{leaf}")

    products = build.products
    normed, residual = _skip_norm(build, f"blk.{i}.ln1", residual, delta, delta_bias, products.smoothing("qkv"))
    smooth_o = products.smoothing("o")
    qkv_DK = [weight("q.weight"), weight("k.weight"), weight("v.weight") / np.reshape(smooth_o, (-1, 1))]
    qkv = products.product(normed, "qkv", np.concatenate(qkv_DK).T)
    qkv_biases = [weight("q.bias"), weight("k.bias"), weight("v.bias") / smooth_o]
    qkv_bias = graph.weight("qkv.bias", np.concatenate(qkv_biases))
    attended = products.attention(qkv, qkv_bias, spec.hidden, spec.heads)
    delta = products.product(attended, "o", weight("o.weight").T)
    delta_bias = graph.weight("o.bias", weight("o.bias"))
    normed, residual = _skip_norm(build, f"blk.{i}.ln2", residual, delta, delta_bias, products.smoothing("fc1"))
    hidden = products.product(normed, "fc1", weight("fc1.weight").T)
    hidden = _biased_activation(graph, hidden, "fc1.bias", weight("fc1.bias"), spec.activation)
    delta = products.product(hidden, "fc2", weight("fc2.weight").T)
    return residual, delta, graph.weight("fc2.bias", weight("fc2.bias"))


def _skip_norm(
    build: Build, norm: str, residual: Any, delta: Any, delta_bias: Any, divisor: NDArray[np.float32] | np.float32
) -> tuple[Any, Any]:
    """(norm(residual + delta + bias) / divisor, residual + delta + bias); the first norm has no branch to close."""
    op, graph, epsilon = build.graph.op, build.graph, build.vision.encoder.layer_norm_eps
    leaf = norm.rpartition(".")[2]
    gamma = graph.weight(f"{leaf}.weight", build.tower(f"{norm}.weight") / divisor)
    beta = graph.weight(f"{leaf}.bias", build.tower(f"{norm}.bias") / divisor)
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
    hidden = build.products.exact(states_TND, "fc1", build.connector("fc1.weight").T)
    bias = build.connector("fc1.bias") if has_bias else zeros
    hidden = _biased_activation(graph, hidden, "fc1.bias", bias, spec.connector_activation)
    embeds = build.products.exact(hidden, "fc2", build.connector("fc2.weight").T)
    return graph.op.Add(embeds, graph.weight("fc2.bias", build.connector("fc2.bias"))) if has_bias else embeds


def linear(build: Build, states_TND: Any) -> Any:
    """One linear layer, always float32."""
    product = build.products.exact(states_TND, "fc1", build.connector("fc1.weight").T)
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
    split = op.Reshape(states_TND, graph.integers("split", [0, squares, factor, squares, factor * spec.hidden]))
    grouped = op.Transpose(split, perm=[0, 1, 3, 2, 4])
    features = op.Reshape(grouped, graph.integers("join", [0, spec.n_tokens, factor * factor * spec.hidden]))
    return build.products.exact(features, "fc1", build.connector("fc1.weight").T)


TOWERS: dict[str, Callable[[Build, Any], Any]] = {"siglip": siglip, "siglip_strip": siglip_strip, "clip": clip}
CONNECTORS: dict[str, Callable[[Build, Any], Any]] = {
    "mlp": mlp,
    "linear": linear,
    "pixel_shuffle": pixel_shuffle,
    "resampler": resampler,
}
