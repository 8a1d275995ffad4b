"""Which quantized product is fastest in ONNX Runtime, at the sizes of vision towers: `make bench-encoder`.

One product per session, all forms in alternating turns; a row says how long each took compared with
DynamicQuantizeMatMul, and the error on normally distributed activations and weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgevlm.bench import card
from edgevlm.converters.transforms import quantize_blocks, quantize_columns
from edgevlm.machine import usable_cpus

Array = NDArray[np.float32]
#: Tokens -> (inputs, outputs) of qkv, o, fc1 and fc2: CLIP-B/16-224, CLIP-L/14-336, SigLIP-so400m/14, SigLIP-B/16-512.
SIZES = {
    197: [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
    577: [(1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)],
    729: [(1152, 3456), (1152, 1152), (1152, 4304), (4304, 1152)],
    1024: [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
}
REFERENCE = "dynamic int8"


def forms(weight_KN: Array) -> Iterator[tuple[str, list[NodeProto], dict[str, NDArray[np.generic]]]]:
    """Name, nodes from `x` to `y`, and constants of each form."""
    inputs, outputs = weight_KN.shape

    def node(kind: str, *names: str, out: str = "y", domain: str = "com.microsoft", **attributes: int) -> NodeProto:
        return helper.make_node(kind, names, [out], domain=domain, **attributes)

    yield "float32", [node("MatMul", "x", "w", domain="")], {"w": weight_KN}
    int8_KN, scale_N = quantize_columns(weight_KN)
    yield REFERENCE, [node("DynamicQuantizeMatMul", "x", "w", "s")], {"w": int8_KN, "s": scale_N}
    whole_N = (np.abs(weight_KN).max(axis=0) / 127).astype(np.float32)
    uint8_KN = (np.rint(weight_KN / whole_N) + 128).astype(np.uint8)
    zeros_N = np.full(outputs, 128, np.uint8)
    yield "dynamic uint8", [node("DynamicQuantizeMatMul", "x", "w", "s", "z")], {
        "w": uint8_KN, "s": whole_N, "z": zeros_N,
    }  # fmt: skip
    yield (
        "static int8",  # scales of the activations known beforehand
        [node("QuantizeLinear", "x", "xs", "xz", out="q", domain=""),
         node("MatMulIntegerToFloat", "q", "w", "xs", "s", "xz")],
        {"w": int8_KN, "s": scale_N, "xs": np.array(9 / 255, np.float32), "xz": np.array(128, np.uint8)},
    )  # fmt: skip
    for bits, block in ((8, 32), (8, 128), (4, 32)):
        packed, scale_NB = quantize_blocks(weight_KN, block) if bits == 4 else _bytes(weight_KN, block)
        nbits = node("MatMulNBits", "x", "w", "s", K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=4)
        yield f"blocks of {block}, {bits} bits", [nbits], {"w": packed, "s": scale_NB.reshape(-1)}


def _bytes(weight_KN: Array, block: int) -> tuple[NDArray[np.uint8], Array]:
    """8 bits for each weight, a scale for each block, as MatMulNBits has them."""
    inputs, outputs = weight_KN.shape
    padded = np.zeros((outputs, -(-inputs // block) * block), np.float32)
    padded[:, :inputs] = weight_KN.T
    blocks = padded.reshape(outputs, -1, block)
    scale_NB = np.abs(blocks).max(axis=-1) / np.float32(127)
    return (np.rint(blocks / np.maximum(scale_NB, 1e-30)[..., None]) + 128).astype(np.uint8), scale_NB


def session(
    nodes: list[NodeProto], constants: dict[str, NDArray[np.generic]], size: tuple[int, int], threads: int
) -> onnxruntime.InferenceSession:
    inputs, outputs = size
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", outputs])
    graph = helper.make_graph(
        nodes, "product", [x], [y], [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def measure(tokens: int, size: tuple[int, int], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """For each form its median ratio to the reference, its best time in ms, and its error."""
    rng = np.random.default_rng(0)
    weight_KN = rng.standard_normal(size, dtype=np.float32) * np.float32(size[0] ** -0.5)
    x = rng.standard_normal((tokens, size[0]), dtype=np.float32)
    exact = x @ weight_KN
    sessions = {name: session(nodes, constants, size, threads) for name, nodes, constants in forms(weight_KN)}
    errors = {
        name: float(np.linalg.norm(run.run(None, {"x": x})[0] - exact) / np.linalg.norm(exact))
        for name, run in sessions.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, run in sessions.items():
            started = time.perf_counter()
            run.run(None, {"x": x})
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[REFERENCE], strict=True)),
            "best_ms": min(values) * 1e3,
            "error": errors[name],
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in card("onnxruntime", "numpy").items()))
    results = {
        f"{tokens} x {size[0]} x {size[1]}": measure(tokens, size, options.rounds, options.threads)
        for tokens, sizes in SIZES.items()
        for size in sizes
    }
    names = list(next(iter(results.values())))
    print(f"\nTime compared with {REFERENCE}; its best time in ms in brackets.\n")
    print(f"| tokens x inputs x outputs | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for title, rows in results.items():
        cells = [f"{row['ratio']:.1f}" for row in rows.values()]
        cells[names.index(REFERENCE)] += f" ({rows[REFERENCE]['best_ms']:.1f})"
        print(f"| {title} | {' | '.join(cells)} |")
    errors = [f"{row['error']:.3f}" for row in rows.values()]
    print(f"| error | {' | '.join(errors)} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
