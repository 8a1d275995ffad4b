"""A tower for pictures of any size and the resampler behind it, as parts of the encoder's graph (MiniCPM-V).

The picture's grid of patches is known only when the graph runs: everything that depends on it is computed there, from
the shape of the pixels, so that the runtime feeds pixels and nothing else. It costs next to nothing.

    positions = table[bucket(i / patches)]                       the tower's, i counts patches row by row
    x = LayerNorm(states @ Wkv)
    delta = MultiHeadAttention(queries, (x + grid) @ Wk, x @ Wv)  grid: sines and cosines of column and row
    embeds = LayerNorm(delta @ Wo + bo) @ proj

The queries are the same for every picture, so their norm and their product are constants.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.resolve import RESAMPLER_HEAD

if TYPE_CHECKING:
    from edgevlm.converters.onnx_vision import Build

_FLOAT, _INT64, _DOUBLE = 1, 7, 11  # TensorProto.DataType
_EPSILON = 1e-6  # of the resampler's norms
_LONGEST_WAVE = 10000.0


def grid_size(graph: Graph, pixels_TCHW: Any, patch_px: int) -> tuple[Any, Any]:
    """(rows, columns) of whole patches, int64 [1] each."""
    op = graph.op
    shape_4 = op.Shape(pixels_TCHW)
    patch = graph.integers("patch_px", [patch_px])
    rows, columns = (op.Slice(shape_4, graph.integers(f"axis.{i}", [i]), graph.integers(f"axis.{i}.end", [i + 1]))
                     for i in (2, 3))  # fmt: skip
    return op.Div(rows, patch), op.Div(columns, patch)


def strip_positions(graph: Graph, n_patches: Any, side: int) -> Any:
    """Rows of the position table for a picture of `n_patches` patches (int64 [1]): int64 [n_patches].

    MiniCPM-Llama3-V 2.5 shows its pictures to the tower as one row of patches, whatever their grid. Patch i lies at the
    fraction i / n of that row, and the first `side` rows of the table share it evenly. The float32 arithmetic is that
    of `Idefics2VisionEmbeddings` (transformers 5.23): i times the rounded reciprocal, then the number of boundaries
    k / side that are not above it. Rounding puts some patches one row lower than i * side // n would.
    """
    op = graph.op
    boundaries_K = (np.arange(1, side, dtype=np.float64) / side).astype(np.float32)
    # By way of float64, which rounds to the same: ONNX Runtime would make i / n of a float32 reciprocal and a product.
    reciprocal = op.Div(graph.weight("one", np.ones(1, np.float64)), op.Cast(n_patches, to=_DOUBLE))
    fraction_N = op.Mul(_count(graph, "patches", n_patches), op.Cast(reciprocal, to=_FLOAT))
    fraction_N = op.Min(fraction_N, graph.weight("below_one", np.array([1 - 1e-6], np.float32)))
    passed_NK = op.GreaterOrEqual(
        op.Unsqueeze(fraction_N, graph.integers("last", [1])), graph.weight("boundaries", boundaries_K)
    )
    return op.ReduceSum(op.Cast(passed_NK, to=_INT64), graph.integers("summed", [1]), keepdims=0)


def strip_table(build: Build) -> Any:
    """The tower's positions for the picture at hand, float32 [patches, hidden]. The table's other rows go unused."""
    graph, side = build.graph, math.isqrt(build.vision.positions)
    with graph.scope("strip"):
        rows, columns = grid_size(graph, build.pixels_TCHW, build.vision.encoder.patch_px)
        ids_N = strip_positions(graph, graph.op.Mul(rows, columns), side)
        table_ND = graph.weight("position.weight", build.tower("position.weight")[:side])
        return graph.op.Gather(table_ND, ids_N, axis=0)


def resampler(build: Build, states_TND: Any) -> Any:
    """So many embeddings for a picture of any size, by one attention of constant queries, always float32."""
    graph, op, spec = build.graph, build.graph.op, build.vision.encoder
    width = spec.n_embd

    def part(name: str, i: int) -> NDArray[np.float32]:
        """Of q, k or v; read where it is stored, so that no two of them are in memory."""
        third: NDArray[np.float32] = np.split(build.connector(name), 3)[i]
        return third

    states = build.products.exact(states_TND, "kv", build.connector("kv.weight").T)
    x_TND = _norm(build, states, "ln_kv")
    k = build.products.exact(op.Add(x_TND, _grid_positions(build)), "k", part("qkv.weight", 1).T)
    v = build.products.exact(x_TND, "v", part("qkv.weight", 2).T)

    query_QD = build.connector("query").astype(np.float64)
    query_QD = _normed(query_QD, build.connector("ln_q.weight"), build.connector("ln_q.bias"))
    q_QD = query_QD @ part("qkv.weight", 0).T.astype(np.float64) + part("qkv.bias", 0)
    n_tiles = op.Slice(op.Shape(states_TND), graph.integers("tiles", [0]), graph.integers("tiles.end", [1]))
    rest = graph.integers("queries.shape", [spec.n_tokens, width])
    q = op.Expand(graph.weight("queries", q_QD[None].astype(np.float32)), op.Concat(n_tiles, rest, axis=0))
    biases = [np.zeros(width, np.float32), part("qkv.bias", 1), part("qkv.bias", 2)]
    bias = graph.weight("kv.bias", np.concatenate(biases))
    attended = op.MultiHeadAttention(q, k, v, bias, num_heads=width // RESAMPLER_HEAD)

    out = build.products.exact(attended, "o", build.connector("o.weight").T)
    out = op.Add(out, graph.weight("o.bias", build.connector("o.bias")))
    return build.products.exact(_norm(build, out, "ln_post"), "proj", build.connector("proj"))


def _grid_positions(build: Build) -> Any:
    """Sines and cosines of each patch's column and, behind them, of its row: float32 [patches, n_embd].

    For a coordinate p, a quarter of the channels holds sin(p / 10000^(k / quarter)), the next one the cosines; all in
    float32, as MiniCPM-V's `get_2d_sincos_pos_embed` has it. Coordinates count patches, so a grid of any size works.
    """
    graph, op, width = build.graph, build.graph.op, build.vision.encoder.n_embd
    quarter = width // 4
    exponents = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    waves_K = np.float32(1) / np.float32(_LONGEST_WAVE) ** exponents
    with graph.scope("grid"):
        rows, columns = grid_size(graph, build.pixels_TCHW, build.vision.encoder.patch_px)
        waves = graph.weight("waves", waves_K.astype(np.float32))
        last, half = graph.integers("last", [1]), graph.integers("half", [2 * quarter])

        def along(name: str, count: Any) -> Any:
            angles_PK = op.Mul(op.Unsqueeze(_count(graph, name, count), last), waves)
            return op.Concat(op.Sin(angles_PK), op.Cos(angles_PK), axis=1)  # [count, half]

        shape_3 = op.Concat(rows, columns, half, axis=0)
        column_RCH = op.Expand(along("column", columns), shape_3)
        row_RCH = op.Expand(op.Unsqueeze(along("row", rows), last), shape_3)
        both_RCD = op.Concat(column_RCH, row_RCH, axis=2)
        return op.Reshape(both_RCD, graph.integers("flat", [-1, width]))


def _count(graph: Graph, name: str, count: Any) -> Any:
    """0, 1, ... below `count` (int64 [1]), as float32 [count]."""
    op = graph.op
    first, step = (op.Squeeze(graph.integers(f"{name}.{word}", [n])) for word, n in (("first", 0), ("step", 1)))
    return op.Cast(op.Range(first, op.Squeeze(count), step), to=_FLOAT)


def _norm(build: Build, x: Any, name: str) -> Any:
    graph = build.graph
    weight, bias = (graph.weight(whole, build.connector(whole)) for whole in (f"{name}.weight", f"{name}.bias"))
    return graph.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=_EPSILON)


def _normed(x_ND: NDArray[np.float64], weight: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same in numpy, for what does not depend on the picture."""
    centred_ND = x_ND - x_ND.mean(axis=-1, keepdims=True)
    variance_N1 = (centred_ND**2).mean(axis=-1, keepdims=True)
    normed_ND: NDArray[np.float64] = centred_ND / np.sqrt(variance_N1 + _EPSILON) * weight + bias
    return normed_ND
