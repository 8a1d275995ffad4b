"""Coverage-guided fuzzing of the Python boundary of the kernels, for images and for frames, with atheris (libFuzzer).

    python tests/fuzz_kernels.py [libFuzzer's options] [new corpus] tests/fuzz_corpus

An input is drawn into a call of a function of `edgevlm.kernels`, `edgevlm.frames` or `edgevlm._kernels`, most of whose
arguments make sense (`fuzzing.py`). A call may refuse; what it accepts must be equal on all targets and stay inside its
memory. With clang the C extension is built for this: it reports its coverage to the fuzzer and runs under
AddressSanitizer and UndefinedBehaviorSanitizer. Without clang the installed extension runs and only the coverage of
Python guides.
"""

from __future__ import annotations

import operator
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from fuzzing import STRINGS, Draw, Guarded
from native import REPOSITORY, SANITIZERS, cmake_build, use_extension

#: Set in the process that fuzzes: the extension that it is to use, or nothing.
EXTENSION = "EDGEVLM_FUZZ_EXTENSION"

if os.environ.get(EXTENSION):
    use_extension(os.environ[EXTENSION])
with atheris.instrument_imports(include=["edgevlm"]):  # what is imported here, `_arrays` among it
    from edgevlm import _kernels, frames, kernels
from edgevlm.errors import EdgeVLMError  # noqa: E402

REFUSALS = (EdgeVLMError, ValueError, TypeError, BufferError, OverflowError, MemoryError)
TARGETS = kernels.targets()
FILTERS = ("box", "bilinear", "hamming", "bicubic", "lanczos")
LAYOUTS = ("yuyv", "nv12", "i420")

#: More pixels than the first are too slow for a fuzzer, but no memory holds the second: that is refused quickly.
SLOW, HOPELESS = 1 << 16, 1 << 45


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
    source, box, filter_name = draw.picture(rows, columns, channels), draw.box(columns, rows), draw.string(FILTERS)
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
    source, table, filter_name = draw.picture(rows, columns, channels), draw.table(channels), draw.string(FILTERS)
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


def yuv_row_bytes(layout: str, width: int) -> int:
    return (width + 1) // 2 * 4 if layout == "yuyv" else width


def yuv_bytes(layout: str, height: int, row_bytes: int) -> int:
    """Length of a frame: rows of luma, then as many bytes of chroma in either planar layout."""
    chroma = 0 if layout == "yuyv" else (height + 1) // 2 * ((row_bytes + 1) // 2 * 2)
    return height * row_bytes + chroma


def fuzz_yuv_size(draw: Draw) -> None:
    arguments = [draw.string(LAYOUTS), *(draw.number(draw.side()) for _ in range(2)), draw.number(draw.below(400))]
    arguments = draw.spoiled(arguments)
    try:
        found = _kernels.yuv_size(*arguments)
    except REFUSALS:
        return
    height, width, stride = map(operator.index, arguments[1:])
    expected = yuv_bytes(arguments[0], height, stride or yuv_row_bytes(arguments[0], width))
    assert found == expected, f"{arguments}: {found} bytes and not {expected}"


def fuzz_yuv(draw: Draw) -> None:
    height, width, layout = draw.side(), draw.side() + draw.pick((0, 0, 64)), draw.pick(LAYOUTS)
    row_bytes = yuv_row_bytes(layout, width)
    stride = draw.pick((0, 0, 0, row_bytes, row_bytes + 1, row_bytes + 2, row_bytes + 61, row_bytes - 1))
    frame = draw.frame(yuv_bytes(layout, height, stride or row_bytes), stride or row_bytes)
    layout_name, matrix = draw.string((layout,)), draw.string(("bt601", "bt709"))
    full_range = draw.number(draw.below(2))
    if draw.below(2):
        out = Guarded(draw.shape(height, width, 3), np.uint8)
        arguments = [frame, out.array, layout_name, matrix, full_range, draw.number(stride)]
        check_function(draw, _kernels.yuv_to_rgb, arguments, out)
        return
    options = {"matrix": matrix, "full_range": full_range, "stride": draw.number(stride) if stride else None}
    options = {name: value for name, value in options.items() if draw.below(8) != 1}
    arguments = draw.spoiled([frame, draw.number(height), draw.number(width), layout_name])
    check(draw, lambda target: frames.yuv_to_rgb(*arguments, target=target, **options).tobytes())


def fuzz_composite(draw: Draw) -> None:
    height, width = draw.side(), draw.side() + draw.pick((0, 0, 64))
    source, background = draw.picture(height, width, 3 if draw.rarely() else 4), draw.colour(3)
    if draw.below(2):
        out = Guarded(draw.shape(height, width, 3), np.uint8)
        check_function(draw, _kernels.composite, [source, out.array, background], out)
        return
    arguments = draw.spoiled([source, background])
    check(draw, lambda target: frames.composite(*arguments, target=target).tobytes())


def flat(picture: Any) -> Any:
    """One channel of it, (H, W), if it is an array that has channels."""
    return picture[:, :, 0] if isinstance(picture, np.ndarray) and any(picture.shape[2:]) else picture


def fuzz_difference(draw: Draw) -> None:
    height, width, channels = draw.side(), draw.side() + draw.pick((0, 0, 64)), draw.pick((1, 3, 4))
    a, b = draw.picture(height, width, channels), draw.picture(*draw.shape(height, width, channels))
    function = draw.pick((_kernels.sum_abs_diff, frames.mean_abs_diff))
    if draw.below(4) == 1:
        a, b = flat(a), flat(b)
    arguments = draw.spoiled([a, b])
    check(draw, lambda target: repr(function(*arguments, target)).encode())


def fuzz_frames(draw: Draw) -> None:
    draw.pick((fuzz_yuv, fuzz_yuv, fuzz_composite, fuzz_difference, fuzz_yuv_size))(draw)


def one_input(data: bytes) -> None:
    draw = Draw(data)
    draw.pick((fuzz_resize, fuzz_tiles, fuzz_frames))(draw)


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
