"""From a picture to the encoder's input: a plan of pure numbers, then one kernel call (a few for tiles).

Bit-equal with the PIL back end of the reference processors (transformers 5.23: `SiglipImageProcessorPil`,
`CLIPImageProcessorPil`, `LlavaImageProcessorPil`, `SmolVLMImageProcessorPil`, `Idefics3ImageProcessorPil`) and with
MiniCPM-V's own code, whose resize is Pillow's. Nothing in here decodes files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgevlm import kernels
from edgevlm.errors import BundleError, ImageError
from edgevlm.tiling import plan_slices, plan_tiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.spec import ImageSpec


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """What happens to a picture of one size, step by step; all numbers are pixels.

    Pad to `padded_height` x `padded_width` with the picture at (`pad_top`, `pad_left`); resize that to
    `resized_height` x `resized_width`; of it, take `rows` x `columns` from (`top`, `left`) on; put them into a tile of
    zeros at (`tile_top`, `tile_left`).
    """

    padded_height: int
    padded_width: int
    pad_top: int
    pad_left: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    rows: int
    columns: int
    tile_top: int
    tile_left: int


def plan_image(height: int, width: int, spec: ImageSpec) -> ImagePlan:
    """Plan the way of a `height` x `width` picture into one tile of `spec.height_px` x `spec.width_px`.

    For the policies that make one tile in one resize; `edgevlm.tiling.plan_tiles` is for the others.

    Raises:
        BundleError: `bundle.invalid`, the spec lacks a number that its policy needs.

    Example:
        >>> from edgevlm.spec import ImageSpec
        >>> clip = ImageSpec(policy="shortest_crop", height_px=336, width_px=336, shortest_px=336, resample="bicubic",
        ...                  rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> plan = plan_image(3000, 4000, clip)
        >>> plan.resized_height, plan.resized_width, plan.left, plan.columns
        (336, 448, 56, 336)
    """
    side = max(height, width)
    padded_height, padded_width = (side, side) if spec.policy == "pad_square" else (height, width)
    if spec.policy == "stretch":
        resized_height, resized_width = spec.height_px, spec.width_px
    else:
        resized_height, resized_width = _shortest_edge(
            padded_height, padded_width, _needed(spec.shortest_px, "shortest_px", spec)
        )
    top, rows, tile_top = _centre(resized_height, spec.height_px)
    left, columns, tile_left = _centre(resized_width, spec.width_px)
    return ImagePlan(
        padded_height=padded_height,
        padded_width=padded_width,
        pad_top=(padded_height - height) // 2,
        pad_left=(padded_width - width) // 2,
        resized_height=resized_height,
        resized_width=resized_width,
        top=top,
        left=left,
        rows=rows,
        columns=columns,
        tile_top=tile_top,
        tile_left=tile_left,
    )


def preprocess(image_HWC: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Make the encoder's input, for the policies whose tiles have one size; `preprocess_batches` is for all.

    Args:
        image_HWC: uint8 RGB, (H, W, 3), as `edgevlm.image.load_image` returns it.
        spec: Policy, sizes and normalization of the model.

    Returns:
        `tiles_TCHW`: float32, (T, 3, spec.height_px, spec.width_px), C-contiguous. T is 1, or what
        `edgevlm.tiling.plan_tiles` says for the policy `tiles`: the grid row by row, then the whole picture.

    Raises:
        ImageError: `image.array`, `image_HWC` is not a uint8 RGB array.
        BundleError: `bundle.invalid`, the spec lacks a number that its policy needs.
    """
    _check_array(image_HWC)
    if spec.policy in ("tiles", "longest_stretch"):
        return _preprocess_twice(image_HWC, spec)
    height, width, _ = image_HWC.shape
    plan = plan_image(height, width, spec)

    # The crop is folded into the resize: only the pixels that survive are computed, and they are the same.
    tiles_TCHW: NDArray[np.float32] = kernels.resize_tiles(
        image_HWC,
        plan.resized_height,
        plan.resized_width,
        spec.resample,
        border=(plan.pad_top, plan.pad_left, plan.padded_height, plan.padded_width),
        window=(plan.top, plan.left, plan.rows, plan.columns),
        border_colour=_needed(spec.pad_rgb, "pad_rgb", spec) if spec.policy == "pad_square" else None,
        canvas=(spec.height_px, spec.width_px, plan.tile_top, plan.tile_left),
        lut_C256=_lookup_table(spec.rescale, spec.mean, spec.std),
    )
    return tiles_TCHW


def preprocess_batches(image_HWC: NDArray[np.uint8], spec: ImageSpec) -> list[NDArray[np.float32]]:
    """Make the encoder's input under any policy: one array for each size of tiles, in the order of their embeddings.

    Args:
        image_HWC, spec: As for `preprocess`.

    Returns:
        float32 (T, 3, H, W) each, C-contiguous. Under the policy `slices` the whole picture, alone, and then, if it is
        cut, its slices row by row; else what `preprocess` returns.

    Raises:
        ImageError, BundleError: As `preprocess`.
    """
    if spec.policy != "slices":
        return [preprocess(image_HWC, spec)]
    _check_array(image_HWC)
    plan = plan_slices(image_HWC.shape[0], image_HWC.shape[1], spec)
    resize = functools.partial(
        kernels.resize_tiles,
        image_HWC,
        resample=spec.resample,
        lut_C256=_lookup_table(spec.rescale, spec.mean, spec.std),
    )
    batches = [resize(plan.whole_height, plan.whole_width)]
    if plan.rows:
        batches.append(resize(plan.cut_height, plan.cut_width, tile=(plan.slice_height, plan.slice_width)))
    return batches


def _check_array(image_HWC: NDArray[np.uint8]) -> None:
    import numpy as np

    if not isinstance(image_HWC, np.ndarray) or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        found = getattr(image_HWC, "shape", type(image_HWC).__name__)
        raise ImageError(f"preprocess needs a uint8 array (H, W, 3), found {found}", code="image.array")


def _preprocess_twice(image_HWC: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Two resizes in a row, as the reference does them: the rounding to 8 bits between them is visible in the result.

    The tiles are cut, and the whole picture is reduced, from the second one's result; it is one picture of the size of
    all tiles, in bytes, and the only thing that is stored beside the tiles.
    """
    import numpy as np

    plan = plan_tiles(image_HWC.shape[0], image_HWC.shape[1], spec)
    lut_C256 = _lookup_table(spec.rescale, spec.mean, spec.std)
    first_HWC = kernels.resize(image_HWC, plan.first_height, plan.first_width, spec.resample)
    tiles_TCHW = np.empty((plan.n_tiles, 3, spec.height_px, spec.width_px), dtype=np.float32)
    last_HWC = first_HWC
    if plan.rows:
        size = (plan.last_height, plan.last_width)
        last_HWC = first_HWC if first_HWC.shape[:2] == size else kernels.resize(first_HWC, *size, spec.resample)
        kernels.resize_tiles(
            last_HWC,
            *size,  # its own size: nothing is resampled, the samples only go to their tiles
            spec.resample,
            tile=(spec.height_px, spec.width_px),
            lut_C256=lut_C256,
            out_TCHW=tiles_TCHW[:-1],
        )
    kernels.resize_tiles(
        last_HWC, spec.height_px, spec.width_px, spec.resample, lut_C256=lut_C256, out_TCHW=tiles_TCHW[-1:]
    )
    return tiles_TCHW


def _shortest_edge(height: int, width: int, shortest_px: int) -> tuple[int, int]:
    """Size with the shorter side `shortest_px` and the longer one cut, not rounded, to a whole number.

    `get_resize_output_image_size` in transformers' `image_transforms.py`; the quotient is a double, as there.
    """
    long_px = int(shortest_px * max(height, width) / min(height, width))
    return (long_px, shortest_px) if width <= height else (shortest_px, long_px)


def _centre(n_have: int, n_want: int) -> tuple[int, int, int]:
    """One axis of a centre crop: (first pixel to take, how many, where to put them in a tile of zeros).

    `center_crop` in transformers' `image_transforms.py`. Its `//` rounds down also below zero, so that of an odd number
    of missing pixels the larger half comes first.
    """
    start = (n_have - n_want) // 2
    return max(start, 0), min(n_have, n_want), max(-start, 0)


@functools.lru_cache(maxsize=16)
def _lookup_table(
    rescale: float, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float32]:
    """The encoder's input for each sample and channel: `lut_C256`, float32, read-only.

    In the reference's order of operations (transformers' `image_transforms.py`): `rescale` multiplies in float64 and
    rounds to float32; `normalize` rounds mean and std to float32, then subtracts and divides in float32.
    """
    import numpy as np

    scaled_256 = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    mean_C1 = np.array(mean, dtype=np.float32)[:, None]
    std_C1 = np.array(std, dtype=np.float32)[:, None]
    lut_C256 = (scaled_256 - mean_C1) / std_C1
    lut_C256.flags.writeable = False  # it is shared between calls
    return lut_C256


Number = TypeVar("Number")


def _needed(value: Number | None, name: str, spec: ImageSpec) -> Number:
    """`value`, which the policy cannot do without."""
    if value is None:
        raise BundleError(
            f"bundle.json: image.{name} is missing, policy `{spec.policy}` needs it; convert the checkpoint again",
            code="bundle.invalid",
        )
    return value
