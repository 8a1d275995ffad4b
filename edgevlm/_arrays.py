"""What the Python sides of the kernels share: pictures checked, errors of the C side translated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgevlm import _kernels
from edgevlm.errors import ImageError, KernelError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def check_image(image_HWC: Any, *, spaced: bool = False) -> NDArray[np.uint8]:
    """A (H, W, C) view of a picture whose pixels are packed inside each row, and whose rows go downwards in memory; a
    copy only if that is not so.

    With `spaced`, RGB pixels may also be four bytes apart.

    Raises:
        ImageError: `image.array`.
    """
    import numpy as np

    if not isinstance(image_HWC, np.ndarray):
        raise ImageError(
            f"a uint8 array (H, W) or (H, W, C) is needed, found {type(image_HWC).__name__}", code="image.array"
        )
    if image_HWC.dtype != np.uint8:
        raise ImageError(
            f"a uint8 array is needed, found {image_HWC.dtype}; convert it, for example with "
            "`.round().clip(0, 255).astype('uint8')`",
            code="image.array",
        )
    view_HWC = image_HWC[:, :, None] if image_HWC.ndim == 2 else image_HWC
    if view_HWC.ndim != 3 or view_HWC.shape[2] not in (1, 3, 4) or 0 in view_HWC.shape:
        raise ImageError(
            f"an array (H, W) or (H, W, C) with C = 1, 3 or 4 is needed, found the shape {image_HWC.shape}",
            code="image.array",
        )
    _, width, channels = view_HWC.shape
    row, pixel, sample = view_HWC.strides
    fits = sample == 1 and (pixel == channels or (spaced and channels == 3 and pixel == 4)) and row >= width * pixel
    return view_HWC if fits else np.ascontiguousarray(view_HWC)


@contextmanager
def translated_errors() -> Iterator[None]:
    """The C side's exceptions as ours; the sentences are the same."""
    try:
        yield
    except _kernels.UnknownTarget as error:
        raise KernelError(str(error), code="kernels.unknown_target") from error
    except _kernels.UnsupportedTarget as error:
        raise KernelError(str(error), code="kernels.unsupported_target") from error
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from error
