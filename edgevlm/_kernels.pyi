import numpy as np
from numpy.typing import NDArray

COMPILER: str
MAX_SIDE: int

class UnknownTarget(ValueError): ...
class UnsupportedTarget(ValueError): ...

def targets() -> list[str]: ...
def active() -> str: ...
def resize(
    src_HWC: NDArray[np.uint8],
    dst_HWC: NDArray[np.uint8],
    resample: str,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    origin: tuple[int, int],
    target: str | None,
    /,
) -> None: ...
def resize_tiles(
    src_HWC: NDArray[np.uint8],
    dst_TCHW: NDArray[np.uint8 | np.float32],
    lut_C256: NDArray[np.float32] | None,
    resample: str,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    window: tuple[int, ...],
    border: tuple[int, ...],
    border_colour: bytes,
    canvas: tuple[int, ...],
    canvas_colour: bytes,
    target: str | None,
    /,
) -> None: ...
def yuv_size(layout: str, height: int, width: int, stride: int, /) -> int: ...
def yuv_to_rgb(
    src: NDArray[np.uint8],
    dst_HWC: NDArray[np.uint8],
    layout: str,
    matrix: str,
    full_range: bool,
    stride: int,
    target: str | None,
    /,
) -> None: ...
def composite(
    src_HWC: NDArray[np.uint8],
    dst_HWC: NDArray[np.uint8],
    background_rgb: tuple[int, int, int],
    target: str | None,
    /,
) -> None: ...
def attention(
    qkv_BSE: NDArray[np.float32],
    bias_E: NDArray[np.float32],
    out_BSD: NDArray[np.float32],
    heads: int,
    target: str | None,
    /,
) -> None: ...
def sum_abs_diff(a_HWC: NDArray[np.uint8], b_HWC: NDArray[np.uint8], target: str | None, /) -> int: ...
