"""The graph builder and each operator that the towers rely on, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest

from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.transforms import quantize_columns

RNG = np.random.default_rng(0)


def run(tmp_path, build, x, name="g"):
    """Build a graph of one input and one output with `build(graph, value)`, save it, run it."""
    graph = Graph("test", tmp_path / f"{name}.onnx.data")
    value = graph.input("x", list(x.shape))
    result = build(graph, value)
    graph.output(result, "y", [None] * x.ndim)
    graph.save(tmp_path / f"{name}.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_values_flow_and_weights_lie_outside(tmp_path):
    x, w = random(2, 3, 64), random(64, 64)
    found = run(tmp_path, lambda graph, v: graph.op.MatMul(v, graph.weight("w", w)), x)
    assert np.allclose(found, x @ w, atol=1e-4)
    assert (tmp_path / "g.onnx.data").stat().st_size == w.nbytes
    assert (tmp_path / "g.onnx").stat().st_size < 1000


def test_large_weights_lie_on_page_boundaries(tmp_path):
    import onnx

    def build(graph, v):
        small, large = graph.weight("small", random(32)), graph.weight("large", random(64, 64))
        return graph.op.Add(graph.op.MatMul(v, large), graph.op.ReduceSum(small))

    run(tmp_path, build, random(1, 64))
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    offsets = {t.name: {e.key: e.value for e in t.external_data}.get("offset") for t in model.graph.initializer}
    assert offsets == {"small": "0", "large": "4096"}
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {"g.onnx.data"}
    onnx.checker.check_model(tmp_path / "g.onnx")


def test_scopes_name_nodes_and_weights(tmp_path):
    graph = Graph("test", tmp_path / "x.onnx.data")
    value = graph.input("x", [2])
    with graph.scope("blk.0"), graph.scope("attn"):
        first = graph.op.Neg(value)
        second = graph.op.Neg(first)
        weight = graph.weight("w", random(2))
    assert (first.name, second.name) == ("blk.0.attn.Neg/output_0", "blk.0.attn.Neg_2/output_0")
    assert weight.name == "blk.0.attn.w"
    assert graph.op.Neg(value).name == "Neg/output_0"
    graph.close()


def test_a_name_that_appears_twice_is_our_bug(tmp_path):
    graph = Graph("test", tmp_path / "x.onnx.data")
    graph.weight("w", random(2))
    with pytest.raises(AssertionError, match="'w'"):
        graph.weight("w", random(2))
    with graph.scope("deeper"):
        graph.weight("w", random(2))
    graph.close()


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    w, x = random(64, 64), random(1, 64)
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        run(folder, lambda graph, v: graph.op.MatMul(v, graph.weight("w", w)), x)
    assert (tmp_path / "a" / "g.onnx").read_bytes() == (tmp_path / "b" / "g.onnx").read_bytes()
    assert (tmp_path / "a" / "g.onnx.data").read_bytes() == (tmp_path / "b" / "g.onnx.data").read_bytes()


# what the fused operators mean; each pair of formulas differs by more than the tolerance of the towers' tests

ERF = np.vectorize(math.erf)
FORMULAS = {
    "FastGelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "BiasGelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "QuickGelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_activations(tmp_path, kind):
    x, bias = random(3, 5, 96) * 2, random(96)

    def build(graph, v):
        b = graph.weight("b", bias)
        if kind == "QuickGelu":
            return graph.op.QuickGelu(graph.op.Add(v, b), alpha=1.702)
        return getattr(graph.op, kind)(v, b)

    found = run(tmp_path, build, x)
    true = (x + bias).astype(np.float64)
    assert np.abs(found - FORMULAS[kind](true)).max() < 2e-5
    for other in set(FORMULAS) - {kind}:
        assert np.abs(found - FORMULAS[other](true)).max() > 2e-4, other


def _norm(x, gamma, beta, epsilon):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gamma + beta


def test_skip_layer_normalization(tmp_path):
    x, skip, gamma, beta, bias = random(2, 4, 48) * 0.01, random(4, 48)[None] * 0.01, *(random(48) for _ in range(3))
    bias *= 0.01
    skip = np.repeat(skip, 2, axis=0)

    def build(output, epsilon):
        def add(graph, v):
            inputs = [
                graph.weight(name, value) for name, value in (("s", skip), ("g", gamma), ("b", beta), ("d", bias))
            ]
            return graph.op.SkipLayerNormalization(v, *inputs, epsilon=epsilon, _outputs=4)[output]

        return add

    total = x + skip + bias
    normed = run(tmp_path, build(0, 1e-5), x, "normed")
    assert np.abs(normed - _norm(total, gamma, beta, 1e-5)).max() < 1e-5
    assert np.abs(normed - _norm(total, gamma, beta, 1e-6)).max() > 1e-3  # the epsilon given is the one used
    assert np.abs(run(tmp_path, build(3, 1e-5), x, "total") - total).max() < 1e-7


def test_multi_head_attention(tmp_path):
    x, bias, heads, width = random(2, 5, 3 * 24), random(72), 3, 8

    def build(graph, v):
        q, k, value = graph.op.Split(v, axis=-1, _outputs=3)
        return graph.op.MultiHeadAttention(q, k, value, graph.weight("b", bias), num_heads=heads)

    found = run(tmp_path, build, x)
    q, k, v = ((x + bias).reshape(2, 5, 3, heads, width)[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = (weights / weights.sum(-1, keepdims=True)) @ v
    assert np.abs(found - wanted.transpose(0, 2, 1, 3).reshape(2, 5, 24)).max() < 1e-5
    assert np.abs(found - x[..., 48:]).max() > 0.1


def test_dynamic_quantized_product(tmp_path):
    """The same integers in numpy: activations to 8 bits with one scale for the tensor, weights with one per column."""
    x, w = random(1, 40, 64), random(64, 32) * np.logspace(-2, 1, 32, dtype=np.float32)
    int8_KN, scale_N = quantize_columns(w)

    def build(graph, v):
        return graph.op.DynamicQuantizeMatMul(v, graph.weight("w", int8_KN), graph.weight("s", scale_N))

    found = run(tmp_path, build, x)
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    quantized = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    wanted = (quantized.astype(np.int64) @ int8_KN.astype(np.int64)) * (scale * scale_N)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    error_N = np.sqrt(((found - x @ w) ** 2).mean((0, 1)) / ((x @ w) ** 2).mean((0, 1)))
    assert error_N.max() < 0.02  # the small columns lose no more than the large ones
