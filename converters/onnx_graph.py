"""Build an ONNX graph as one writes an expression: `y = op.MatMul(x, w)`. The only import of `onnx_ir`.

Each call adds one node and returns its output value, so nobody passes names around. Weights go straight into a data
file beside the graph: one at a time, aligned, never all in memory. A name that appears twice is an error.

    with graph.scope("blk.0"):
        y = op.MatMul(x, graph.weight("q.weight", array))      # node `blk.0.MatMul`, weight `blk.0.q.weight`
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.transforms import quantize_blocks, quantize_columns
from edgevlm.errors import need
from edgevlm.storage import storage_errors

OPSET = 17
IR_VERSION = 10
#: ONNX Runtime's own domain, and ours.
MICROSOFT, OURS = "com.microsoft", "edgevlm"
_CONTRIB = {
    "BiasGelu", "DynamicQuantizeMatMul", "FastGelu", "Gelu", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
    "SkipLayerNormalization",
}  # fmt: skip
#: Operators that are not standard ONNX -> their domain. Ours is docs/kernels.md's attention.
_DOMAINS = {**dict.fromkeys(_CONTRIB, MICROSOFT), "QkvAttention": OURS}
_INLINE_BYTES = 64  # shapes and scalars stay in the graph, where shape inference needs them
_PAGE_BYTES, _LINE_BYTES = 4096, 64


def _alignment(array: NDArray[Any]) -> int:
    return _PAGE_BYTES if array.nbytes >= _PAGE_BYTES else _LINE_BYTES


class Graph:
    """A graph under construction.

    Args:
        name: Name of the graph.
        data_path: Where the weights go; created here, `save` puts the graph beside it.

    Raises:
        DependencyError: onnx_ir is missing.
        StorageError: the data file cannot be written (from here, `weight` and `close`).
    """

    def __init__(self, name: str, data_path: Path) -> None:
        self._ir = need("onnx_ir", "convert")
        self._name, self._data_path = name, data_path
        self._scopes: list[str] = []
        self._names: set[str] = set()
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._counts: dict[str, int] = {}
        with storage_errors(data_path):
            self._data = self._open()

    def _open(self) -> IO[bytes]:
        return open(self._data_path, "xb")

    @staticmethod
    def columns(weight_KN: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """See `transforms.quantize_columns`."""
        return quantize_columns(weight_KN)

    @staticmethod
    def blocks(weight_KN: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """See `transforms.quantize_blocks`."""
        return quantize_blocks(weight_KN, block)

    @property
    def op(self) -> Operators:
        return Operators(self)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything added inside the block."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: str, shape: list[int | str]) -> Any:
        """Declare the float32 input; a text in `shape` is an axis of any length."""
        value = self._ir.Value(
            name=self._claim(name), type=self._ir.TensorType(self._ir.DataType.FLOAT), shape=self._ir.Shape(shape)
        )
        self._inputs.append(value)
        return value

    def output(self, value: Any, name: str, shape: list[int | str]) -> None:
        """Declare a value as the float32 output `name`."""
        value.name = self._claim(name)
        value.type = self._ir.TensorType(self._ir.DataType.FLOAT)
        value.shape = self._ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, array: NDArray[Any]) -> Any:
        """Add a constant; its bytes are written now and forgotten.

        Args:
            name: Unique within the scope.
            array: float32, float64, float16, int8, uint8 or int64.
        """
        array = np.ascontiguousarray(array)
        full_name = self._claim(self.full_name(name))
        if array.nbytes <= _INLINE_BYTES:
            tensor = self._ir.Tensor(array.copy(), name=full_name)
        else:
            tensor = self._ir.ExternalTensor(
                self._data_path.name,
                self._append(array),
                array.nbytes,
                self._ir.DataType.from_numpy(array.dtype),
                shape=self._ir.Shape(array.shape),
                name=full_name,
                base_dir=self._data_path.parent,
            )
        value = self._ir.Value(name=full_name, type=self._ir.TensorType(tensor.dtype), shape=tensor.shape,
                               const_value=tensor)  # fmt: skip
        self._initializers.append(value)
        return value

    def integers(self, name: str, numbers: list[int]) -> Any:
        """Add an int64 constant, as shapes and axes are."""
        return self.weight(name, np.array(numbers, np.int64))

    def add_node(self, kind: str, inputs: tuple[Any, ...], attributes: dict[str, Any], outputs: int) -> list[Any]:
        """Add a node named after its scope and kind; a None input is an optional one left out."""
        base = self.full_name(kind)
        self._counts[base] = self._counts.get(base, 0) + 1
        name = self._claim(base if self._counts[base] == 1 else f"{base}_{self._counts[base]}")
        node = self._ir.node(
            kind,
            list(inputs),
            attributes,
            domain=_DOMAINS.get(kind, ""),
            num_outputs=outputs,
            name=name,
        )
        for i, value in enumerate(node.outputs):
            value.name = self._claim(f"{name}/output_{i}")
        self._nodes.append(node)
        return list(node.outputs)

    def save(self, path: Path) -> None:
        """Write the graph beside its data file and finish both."""
        model = self._finish()
        with storage_errors(path):
            self._ir.save(model, path)

    def _finish(self) -> Any:
        """Close the data file; returns the model."""
        self.close()
        opsets = {"": OPSET, MICROSOFT: 1}
        if any(node.domain == OURS for node in self._nodes):
            opsets[OURS] = 1
        graph = self._ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=opsets,
            name=self._name,
        )
        return self._ir.Model(graph, ir_version=IR_VERSION, producer_name="edgevlm")

    def close(self) -> None:
        """Close the data file; safe to call twice."""
        with storage_errors(self._data_path):
            self._data.close()

    def _append(self, array: NDArray[Any]) -> int:
        """Append to the data file, large tensors on page boundaries so that they can be mapped. Returns the offset."""
        with storage_errors(self._data_path):
            self._data.write(bytes(-self._data.tell() % _alignment(array)))
            offset = self._data.tell()
            self._data.write(array.tobytes())
        return offset

    def full_name(self, name: str) -> str:
        """A name with the scopes around it."""
        return ".".join([*self._scopes, name])

    def _claim(self, name: str) -> str:
        assert name not in self._names, f"two things in the graph are called {name!r}"
        self._names.add(name)
        return name


class MeasuredGraph(Graph):
    """A graph that writes nothing: how large it would be, and what would be in it. Weights may hold anything.

    Attributes:
        nbytes: Size of the graph and of its data, once it was saved.
        on_weight: Called with the full name and the array of each weight.
    """

    def __init__(self, name: str, data_path: Path, on_weight: Callable[[str, NDArray[Any]], None]) -> None:
        self.on_weight = on_weight
        self.nbytes = (0, 0)
        self._position = 0
        super().__init__(name, data_path)

    def _open(self) -> IO[bytes]:
        return io.BytesIO()

    @staticmethod
    def columns(weight_KN: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        return np.zeros(weight_KN.shape, np.int8), np.zeros(weight_KN.shape[1], np.float32)

    @staticmethod
    def blocks(weight_KN: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        inputs, outputs = weight_KN.shape
        blocks = -(-inputs // block)
        return np.zeros((outputs, blocks, block // 2), np.uint8), np.zeros((outputs, blocks), np.float32)

    def weight(self, name: str, array: NDArray[Any]) -> Any:
        self.on_weight(self.full_name(name), array)
        # fresh zeros take no memory until somebody looks at them
        return super().weight(name, np.zeros(array.shape, array.dtype))

    def save(self, path: Path) -> None:
        proto = self._ir.to_proto(self._finish())
        self.nbytes = (proto.ByteSize(), self._position)

    def _append(self, array: NDArray[Any]) -> int:
        offset = self._position + -self._position % _alignment(array)
        self._position = offset + array.nbytes
        return offset


class Operators:
    """`op.Kind(inputs..., attribute=..., _outputs=1)`: one node for each call.

    Returns:
        The output value, or the list of them if `_outputs` is more than one.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def add(*inputs: Any, _outputs: int = 1, **attributes: Any) -> Any:
            values = self._graph.add_node(kind, inputs, attributes, _outputs)
            return values[0] if _outputs == 1 else values

        return add
