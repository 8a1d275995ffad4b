"""Coverage-guided fuzzing of the image kernels' Python boundary, with atheris (libFuzzer).

    python tests/fuzz_kernels.py [libFuzzer's options] [new corpus] tests/fuzz_corpus

An input is drawn into a call of `kernels.resize`, `kernels.resize_tiles` or their C functions, most of whose arguments
make sense. A call may refuse; what it accepts must be equal on all targets and stay inside its memory. With clang the C
extension is built for this: it reports its coverage to the fuzzer and runs under AddressSanitizer and
UndefinedBehaviorSanitizer. Without clang the installed extension runs and only the coverage of Python guides.
"""

from __future__ import annotations

import operator
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from native import REPOSITORY, SANITIZERS, cmake_build, use_extension
from numpy.lib.stride_tricks import as_strided

#: Set in the process that fuzzes: the extension that it is to use, or nothing.
EXTENSION = "EDGEVLM_FUZZ_EXTENSION"

if os.environ.get(EXTENSION):
    use_extension(os.environ[EXTENSION])
with atheris.instrument_imports(include=["edgevlm.kernels"]):
    from edgevlm import _kernels, kernels
from edgevlm.errors import EdgeVLMError  # noqa: E402

REFUSALS = (EdgeVLMError, ValueError, TypeError, BufferError, OverflowError, MemoryError)
TARGETS = kernels.targets()
FILTERS = ("box", "bilinear", "hamming", "bicubic", "lanczos")

#: More pixels than the first are too slow for a fuzzer, but no memory holds the second: that is refused quickly.
SLOW, HOPELESS = 1 << 16, 1 << 45

NUMBERS = (
    -1, 0, 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**64, -(2**31), -(2**63), 10**5000, 0.5, -0.0,
    1e-45, 1e300, float("nan"), float("inf"), -float("inf"), True, None, "7", b"7", 1j, [1],
    np.int8(-1), np.uint64(2**63), np.float32("nan"), np.array(3), np.array([3, 4]),
)  # fmt: skip
STRINGS = ("", "nearest", "bicubic\0", "bi\udcffcubic", "b" * 5000, b"box", None, 3, ["box"])
ANYTHING: tuple[Any, ...] = (
    None,
    3,
    -2.5,
    "abcd",
    b"\x00" * 16,
    (),
    (1, 2),
    [1, 2, 3, 4],
    {},
    object(),
    range(4),
    slice(2),
)


def arrays() -> tuple[Any, ...]:
    """Arrays that are not quite pictures, tiles or tables; some are legal."""
    base = np.arange(240, dtype=np.uint8).reshape(8, 10, 3)
    read_only = base.copy()
    read_only.flags.writeable = False
    shapes = ((), (0,), (5,), (0, 5, 3), (5, 0, 3), (5, 5, 0), (5, 5, 2), (2, 2, 3, 3), (3, 256))
    dtypes = ("int8", ">u2", "float32", ">f4", "bool", "object", "complex64", "S1", "M8[s]", "u1,u1")
    views = (
        base[::-1], base[:, ::-1], base[:, :, ::-1], base[::2, ::3], base[:1][::-1], base.T, np.asfortranarray(base),
        base[:, :, :1], base.transpose(1, 0, 2), read_only, base.view(np.recarray), np.ma.masked_array(base),
        as_strided(base, (6, 4, 3), (2, 3, 1)), as_strided(base, (1, 4, 3), (-(2**62), 3, 1)),
        as_strided(base, (4, 1, 3), (30, -(2**62), 1)), np.broadcast_to(base[0, 0, 0], (2**24 + 1, 1, 1)),
        np.broadcast_to(base[0, 0, 0], (4, 5, 3)), np.broadcast_to(base[0, 0, 0], (2**40, 2**20, 3)),
    )  # fmt: skip
    buffers = (
        bytearray(60),
        memoryview(bytes(60)).cast("B", (4, 5, 3)),
        memoryview(bytearray(60)).cast("b", (4, 5, 3)),
    )
    tables = (np.zeros((3, 256), np.float32), np.full((3, 256), np.nan, np.float32), np.zeros((3, 256)))
    zeros = [np.zeros(shape, np.uint8) for shape in shapes] + [np.zeros((4, 5, 3), dtype) for dtype in dtypes]
    return (*zeros, *views, *buffers, *tables)


class Draw:
    """An input, read as decisions. One that has ended decides for what makes sense."""

    def __init__(self, data: bytes) -> None:
        self.data = atheris.FuzzedDataProvider(data)

    def below(self, n: int) -> int:
        return int(self.data.ConsumeIntInRange(0, n - 1))

    def rarely(self) -> bool:
        return self.below(64) == 1

    def pick(self, values: Sequence[Any]) -> Any:
        return values[self.below(len(values))]

    def side(self) -> int:
        return 1 + self.below(self.pick((4, 24, 90)))

    def margin(self) -> int:
        return int(self.pick((0, 0, 1, 7)))

    def number(self, sound: float) -> Any:
        return self.pick(NUMBERS) if self.rarely() else sound

    def numbers(self, *sound: float) -> Any:
        values = tuple(map(self.number, sound))
        return self.pick((list(values), values[1:], (*values, 1), *ANYTHING)) if self.rarely() else values

    def string(self) -> Any:
        return self.pick(STRINGS) if self.rarely() else self.pick(FILTERS)

    def colour(self, channels: int) -> list[Any]:
        return [self.number(self.below(256)) for _ in range(self.below(6) if self.rarely() else channels)]

    def interval(self, size: int) -> tuple[int, int]:
        """Start and length of a part of `size`, often all of it."""
        if self.below(2):
            return 0, size
        start = self.below(size)
        return start, 1 + self.below(size - start)

    def box(self, width: int, height: int) -> Any:
        xs, ys = (sorted(self.below(2**20 + 1) / 2**20 * side for _ in range(2)) for side in (width, height))
        return self.numbers(xs[0], ys[0], xs[1], ys[1])

    def picture(self, height: int, width: int, channels: int) -> Any:
        """Noise, in rows with a gap between them or not, and in some layout."""
        if self.rarely():
            return self.pick(arrays())
        rng = np.random.default_rng(self.below(256))
        noise_HWC = rng.integers(0, 256, (height, width + self.margin(), channels), np.uint8)[:, :width]
        if self.below(4) != 1:
            return noise_HWC
        flips = (noise_HWC[::-1], noise_HWC[:, ::-1], noise_HWC[:, :, ::-1], noise_HWC.transpose(1, 0, 2))
        strides = ((0, channels, 1), (1, channels, 1), (width * channels, 0, 1), (0, 0, 0))
        overlaps = [as_strided(noise_HWC, noise_HWC.shape, bytes_HWC) for bytes_HWC in strides]
        spaced_HWC = rng.integers(0, 256, (height, width, 4), np.uint8)[:, :, :channels]
        return self.pick((*flips, *overlaps, np.asfortranarray(noise_HWC), spaced_HWC))

    def table(self, channels: int) -> Any:
        """For float32; None for uint8."""
        if self.rarely():
            return self.pick(arrays())
        table_C256 = np.random.default_rng(1).normal(size=(channels, 256)).astype(np.float32)
        return self.pick((None, table_C256))

    def spoiled(self, arguments: list[Any]) -> list[Any]:
        """The same, or one replaced or missing."""
        if not self.rarely():
            return arguments
        at = self.below(len(arguments))
        return arguments[:at] + self.pick(([self.pick(ANYTHING)], [self.pick(arrays())], [])) + arguments[at + 1 :]


def is_slow(sides: Any) -> bool:
    """Whether the last two of these are sides of something legal, but slow."""
    try:
        rows, columns = map(operator.index, tuple(sides)[-2:])
    except (TypeError, ValueError):
        return False
    legal = min(rows, columns) >= 1 and max(rows, columns) <= _kernels.MAX_SIDE
    return legal and SLOW < rows * columns < HOPELESS


def check(draw: Draw, call: Callable[[Any], bytes]) -> None:
    """`call` takes a target and answers with all bytes that it could have written."""
    if draw.rarely():
        try:
            call(draw.pick((*STRINGS, "sse9", "neon")))
        except REFUSALS:
            return
    try:
        expected = call("scalar")
    except REFUSALS:
        return
    for target in (*TARGETS[1:], None):
        assert call(target) == expected, f"{target} differs from scalar"


class Guarded:
    """An array, and a margin around it that nobody may write to."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.memory = np.zeros(n_bytes + 128, np.uint8)
        self.array = self.memory[64:-64].view(dtype).reshape(shape)

    def reset(self) -> None:
        self.memory[:] = 0xA5

    def contents(self) -> bytes:
        assert self.memory[:64].tobytes() == self.memory[-64:].tobytes() == b"\xa5" * 64, "a write outside the output"
        return self.memory.tobytes()


def check_function(draw: Draw, function: Callable[..., None], arguments: list[Any], out: Guarded) -> None:
    """`function` of the C extension writes into `out`, which is one of its arguments, if they are not spoiled."""
    arguments = draw.spoiled(arguments)

    def call(target: Any) -> bytes:
        out.reset()
        function(*arguments, target)
        return out.contents()

    check(draw, call)


def fuzz_resize(draw: Draw) -> None:
    rows, columns, height, width, channels = *(draw.side() for _ in range(4)), draw.pick((1, 3, 4))
    (top, n_rows), (left, n_columns) = draw.interval(height), draw.interval(width)
    source, box, filter_name = draw.picture(rows, columns, channels), draw.box(columns, rows), draw.string()
    if draw.below(2):
        out = Guarded((n_rows, n_columns, channels), np.uint8)
        arguments = [source, out.array, filter_name, draw.numbers(height, width), box, draw.numbers(top, left)]
        check_function(draw, _kernels.resize, arguments, out)
        return
    size, window = (
        (draw.number(height), draw.number(width)),
        draw.pick((None, draw.numbers(top, left, n_rows, n_columns))),
    )
    options = {"window": window, "threads": draw.number(draw.pick((1, 1, 1, 2)))}
    arguments = [source, *size, filter_name, draw.pick((None, box))]
    if not is_slow(window or size):
        check(draw, lambda target: kernels.resize(*arguments, target, **options).tobytes())


def fuzz_tiles(draw: Draw) -> None:
    rows, columns, height, width, channels = *(draw.side() for _ in range(4)), draw.pick((1, 3, 4))
    (top, n_rows), (left, n_columns) = draw.interval(height), draw.interval(width)
    source, table, filter_name = draw.picture(rows, columns, channels), draw.table(channels), draw.string()
    border_top, border_left, canvas_top, canvas_left, tile = (
        *(draw.margin() for _ in range(4)),
        (draw.side(), draw.side()),
    )
    bordered = (border_top + rows + draw.margin(), border_left + columns + draw.margin())
    n_down, n_across = -(-(canvas_top + n_rows) // tile[0]), -(-(canvas_left + n_columns) // tile[1])
    box = draw.box(bordered[1], bordered[0])
    window = draw.numbers(top, left, n_rows, n_columns)
    border = draw.numbers(border_top, border_left, *bordered)
    canvas = draw.numbers(n_down * tile[0], n_across * tile[1], canvas_top, canvas_left)
    colours = draw.colour(channels), draw.colour(channels)
    if is_slow(border) or is_slow(canvas[:2] if isinstance(canvas, tuple) else canvas):
        return
    shape = (n_down * n_across, channels, *tile)
    out = Guarded(shape, np.uint8 if table is None else np.float32)
    if draw.below(2):
        tiles = draw.pick((out.array,) * 15 + (out.array.reshape(1, -1, *tile),))
        octets = [bytes(whole % 256 for whole in colour if isinstance(whole, int)) for colour in colours]
        arguments = [
            source,
            tiles,
            table,
            filter_name,
            draw.numbers(height, width),
            box,
            window,
            border,
            octets[0],
            (*canvas, draw.number(0), draw.number(n_down * tile[0])) if isinstance(canvas, tuple) else canvas,
            octets[1],
        ]
        check_function(draw, _kernels.resize_tiles, arguments, out)
        return
    options = {
        "border": border,
        "window": window,
        "canvas": canvas,
        "tile": draw.numbers(*tile),
        "border_colour": colours[0],
        "canvas_colour": colours[1],
        "lut_C256": table,
        "out_TCHW": out.array,
    }
    options = {name: value for name, value in options.items() if draw.below(8) != 1}
    arguments = [source, draw.number(height), draw.number(width), filter_name, draw.pick((None, box))]
    if not is_slow(arguments[1:3]):
        check(draw, lambda target: kernels.resize_tiles(*arguments, target, **options).tobytes())


def one_input(data: bytes) -> None:
    draw = Draw(data)
    draw.pick((fuzz_resize, fuzz_tiles))(draw)


def start_over() -> None:
    """Become a process that fuzzes, under the sanitizers if there is clang."""
    environment = os.environ | {EXTENSION: ""}
    if shutil.which("clang"):
        folder = REPOSITORY / "build" / "fuzz"
        cmake_build(REPOSITORY, folder, "_kernels", f"-O1 -g -fsanitize=fuzzer-no-link {SANITIZERS}", compiler="clang")
        environment |= {
            EXTENSION: str(folder / "_kernels.abi3.so"),
            "LD_PRELOAD": str(Path(atheris.path()) / "asan_with_fuzzer.so"),
            # The interpreter itself leaks; and what is refused for want of memory is to be refused quickly.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=99:quarantine_size_mb=9",
        }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    if EXTENSION not in os.environ:
        start_over()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
