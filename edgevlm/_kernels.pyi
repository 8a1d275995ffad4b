import numpy as np
from numpy.typing import NDArray

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
def normalize(
    src_HWC: NDArray[np.uint8], lut_C256: NDArray[np.float32], dst_CHW: NDArray[np.float32], target: str | None, /
) -> None: ...
