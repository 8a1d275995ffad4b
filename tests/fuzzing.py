"""What a fuzzer's bytes are read as: arguments most of which make sense, and outputs with a margin to watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import atheris
import numpy as np
from numpy.lib.stride_tricks import as_strided

NUMBERS = (
    -1, 0, 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**63, 2**64, -(2**31), -(2**63), 10**5000, 0.5, -0.0,
    1e-45, 1e300, float("nan"), float("inf"), -float("inf"), True, None, "7", b"7", 1j, [1],
    np.int8(-1), np.uint64(2**63), np.float32("nan"), np.array(3), np.array([3, 4]),
)  # fmt: skip
STRINGS = ("", "nearest", "NV12", "bicubic\0", "bi\udcffcubic", "b" * 5000, b"box", None, 3, ["box"])
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
        as_strided(base, (1, 2**61, 3), (0, 4, 1)),
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

    def string(self, valid: Sequence[str]) -> Any:
        return self.pick(STRINGS) if self.rarely() else self.pick(valid)

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
        n_bytes = height * width * 4 - (4 - channels)  # to the last sample: what is ignored behind it is not there
        spaced_bytes = rng.integers(0, 256, n_bytes, np.uint8)
        spaced_HWC = as_strided(spaced_bytes, (height, width, channels), (width * 4, 4, 1))
        return self.pick((*flips, *overlaps, np.asfortranarray(noise_HWC), spaced_HWC))

    def frame(self, n_bytes: int, row_bytes: int) -> Any:
        """Noise of the length of a camera's frame, or nearly, in some kind of buffer."""
        if self.rarely():
            return self.pick(arrays())
        wrong = self.pick((0,) * 12 + (-1, -1, 1, -row_bytes))
        noise = np.random.default_rng(self.below(256)).integers(0, 256, max(0, n_bytes + wrong), np.uint8)
        if self.below(4) != 1:
            return noise
        rows = noise[: len(noise) // row_bytes * row_bytes].reshape(-1, row_bytes)
        closed = memoryview(noise.copy())
        closed.release()
        views = (rows, rows[:, None], rows.T, rows[::-1], noise[::-1], noise.repeat(2)[::2], noise[1:], noise[:, None])
        strides = [as_strided(noise[:1], noise.shape, (step,)) for step in (0, -(2**62))] if len(noise) < 2 else []
        broadcast = np.broadcast_to(np.uint8(200), noise.shape)
        buffers = (noise.tobytes(), bytearray(noise), memoryview(noise)[::-1], memoryview(noise.view(np.int8)), closed)
        return self.pick((*buffers, *views, broadcast, *strides, np.ma.masked_array(noise)))

    def shape(self, *sides: int) -> tuple[int, ...]:
        """`sides`, now and then with one of them off by one: a check that lets that pass is seen by the sanitizers."""
        if self.below(8) != 1:
            return sides
        at, wrong = self.below(len(sides)), self.pick((-1, 1))
        return (*sides[:at], max(0, sides[at] + wrong), *sides[at + 1 :])

    def table(self, channels: int) -> Any:
        """For float32; None for uint8."""
        if self.rarely():
            return self.pick(arrays())
        table_C256 = np.random.default_rng(1).normal(size=(channels, 256)).astype(np.float32)
        unaligned_C256 = memoryview(b"\0" + table_C256.tobytes())[1:].cast("f", (channels, 256))
        return self.pick((None, table_C256) * 7 + (unaligned_C256, table_C256))

    def spoiled(self, arguments: list[Any]) -> list[Any]:
        """The same, or one replaced or missing."""
        if not self.rarely():
            return arguments
        at = self.below(len(arguments))
        return arguments[:at] + self.pick(([self.pick(ANYTHING)], [self.pick(arrays())], [])) + arguments[at + 1 :]


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
