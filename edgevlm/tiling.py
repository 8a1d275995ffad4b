"""Into how many tiles a picture is cut, and by way of which sizes: pure numbers, for pixels and prompt alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.errors import BundleError
from edgevlm.spec import ImageSpec

_LARGEST_PX = 4096  # MAX_IMAGE_SIZE of the reference


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """The sizes that a picture takes in turn, in pixels, and the grid that the last one is cut into.

    Resize to `first_height` x `first_width`, then to `last_height` x `last_width`. Of that, `rows` x `columns` tiles
    and one of the whole picture are made; 0 x 0 if it fits one tile as it is.
    """

    first_height: int
    first_width: int
    last_height: int
    last_width: int
    rows: int
    columns: int

    @property
    def n_tiles(self) -> int:
        return self.rows * self.columns + 1


def plan_tiles(height: int, width: int, spec: ImageSpec) -> TilePlan:
    """Plan a `height` x `width` picture under the policies `tiles` and `longest_stretch`.

    The arithmetic is that of `SmolVLMImageProcessorPil` (transformers 5.23, `resize`, `resize_for_vision_encoder` and
    `split_images`): quotients are doubles, in the same order.

    Raises:
        BundleError: `bundle.invalid`, the spec has no `longest_px`.

    Example:
        >>> from edgevlm.spec import ImageSpec
        >>> smolvlm = ImageSpec(policy="tiles", height_px=512, width_px=512, longest_px=2048, resample="lanczos",
        ...                     rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> plan = plan_tiles(200, 300, smolvlm)
        >>> (plan.first_height, plan.first_width), (plan.last_height, plan.last_width), plan.n_tiles
        ((1366, 2048), (1536, 2048), 13)
    """
    if spec.longest_px is None:
        raise BundleError(
            f"bundle.json: image.longest_px is missing, policy `{spec.policy}` needs it; convert the checkpoint again",
            code="bundle.invalid",
        )
    first_height, first_width = _capped(*_longest_edge(height, width, spec.longest_px))
    last_height, last_width = spec.height_px, spec.width_px
    if spec.policy == "tiles":
        last_height, last_width = _whole_tiles(first_height, first_width, spec)
    cut = (last_height, last_width) != (spec.height_px, spec.width_px)
    return TilePlan(
        first_height=first_height,
        first_width=first_width,
        last_height=last_height,
        last_width=last_width,
        rows=last_height // spec.height_px if cut else 0,
        columns=last_width // spec.width_px if cut else 0,
    )


def _longest_edge(height: int, width: int, longest_px: int) -> tuple[int, int]:
    """Size with the longer side `longest_px`, enlarged if need be, and the other one cut to whole, made even."""
    aspect = width / height
    if width >= height:
        short_px = int(longest_px / aspect)
        return max(short_px + short_px % 2, 1), longest_px
    short_px = int(longest_px * aspect)
    return longest_px, max(short_px + short_px % 2, 1)


def _capped(height: int, width: int) -> tuple[int, int]:
    """The same with no side above the reference's limit."""
    aspect = width / height
    if width >= height and width > _LARGEST_PX:
        return max(int(_LARGEST_PX / aspect), 1), _LARGEST_PX
    if height > width and height > _LARGEST_PX:
        return _LARGEST_PX, max(int(_LARGEST_PX * aspect), 1)
    return height, width


def _whole_tiles(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """Both sides up to whole tiles; the longer one first, from which the other one follows."""
    aspect = width / height
    if width >= height:
        wide_px = _up_to(width, spec.width_px)
        return _up_to(int(wide_px / aspect), spec.height_px), wide_px
    high_px = _up_to(height, spec.height_px)
    return high_px, _up_to(int(high_px * aspect), spec.width_px)


def _up_to(side_px: int, tile_px: int) -> int:
    return math.ceil(side_px / tile_px) * tile_px


@dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """The sizes that a picture takes, in pixels, each from the picture itself.

    `whole_height` x `whole_width` is the whole picture. If `rows` is not 0, it is resized to `cut_height` x `cut_width`
    as well, and that is cut into `rows` x `columns` slices of `slice_height` x `slice_width`.
    """

    whole_height: int
    whole_width: int
    slice_height: int = 0
    slice_width: int = 0
    rows: int = 0
    columns: int = 0

    @property
    def cut_height(self) -> int:
        return self.slice_height * self.rows

    @property
    def cut_width(self) -> int:
        return self.slice_width * self.columns


def plan_slices(height: int, width: int, spec: ImageSpec) -> SlicePlan:
    """Plan a `height` x `width` picture under the policy `slices`.

    The arithmetic is that of MiniCPM-V's own code: `spec.height_px` (448) is the side of a square with as many pixels
    as a slice should have; quotients are doubles, and halves are rounded to even, as Python rounds them.

    Raises:
        BundleError: `bundle.invalid`, the spec lacks `multiple_px` or `most_tiles`.

    Example:
        >>> from edgevlm.spec import ImageSpec
        >>> minicpm = ImageSpec(policy="slices", height_px=448, width_px=448, multiple_px=14, most_tiles=9,
        ...                     resample="bicubic", rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> plan = plan_slices(480, 640, minicpm)
        >>> (plan.whole_height, plan.whole_width), (plan.rows, plan.columns), (plan.slice_height, plan.slice_width)
        ((392, 518), (1, 2), (546, 364))
    """
    if spec.multiple_px is None or spec.most_tiles is None:
        raise BundleError(
            "bundle.json: image.multiple_px or image.most_tiles is missing, policy `slices` needs them; convert the "
            "checkpoint again",
            code="bundle.invalid",
        )
    side_px, multiple_px = spec.height_px, spec.multiple_px
    whole_height, whole_width = _own_shape(height, width, side_px, multiple_px)
    n_wanted = min(math.ceil(width * height / (side_px * side_px)), spec.most_tiles)
    if n_wanted <= 1:
        return SlicePlan(whole_height=whole_height, whole_width=whole_width)
    rows, columns = _best_grid(width / height, n_wanted, spec.most_tiles)
    slice_height, slice_width = _own_shape(
        _nearest(height, rows) / rows, _nearest(width, columns) / columns, side_px, multiple_px
    )
    return SlicePlan(
        whole_height=whole_height,
        whole_width=whole_width,
        slice_height=slice_height,
        slice_width=slice_width,
        rows=rows,
        columns=columns,
    )


def _own_shape(height: float, width: float, side_px: int, multiple_px: int) -> tuple[int, int]:
    """About `side_px` x `side_px` pixels in the shape of `height` x `width`, in whole multiples of `multiple_px`."""
    aspect = width / height
    shaped_height = int(side_px / math.sqrt(aspect))
    shaped_width = int(shaped_height * aspect)
    return _nearest(shaped_height, multiple_px), _nearest(shaped_width, multiple_px)


def _nearest(length: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, but at least one; of two that are equally near, the even multiple."""
    return max(round(length / divisor) * divisor, divisor)


def _best_grid(aspect: float, n_wanted: int, n_most: int) -> tuple[int, int]:
    """(rows, columns) of the grid of one slice less, as many as wanted or one more, whose shape is the picture's.

    Of equally good ones the first, in the order of their number and then of their columns.
    """
    counts = [n for n in (n_wanted - 1, n_wanted, n_wanted + 1) if 1 < n <= n_most]
    grids = [(n // columns, columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    return min(grids, key=lambda grid: abs(math.log(aspect) - math.log(grid[1] / grid[0])))


def grid_of(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """(rows, columns) of tiles beside the whole picture, (0, 0) for a picture that is not cut.

    Raises:
        BundleError: `bundle.invalid`, the spec lacks a number that its policy needs.
    """
    if spec.policy == "tiles":
        tiles = plan_tiles(height, width, spec)
        return tiles.rows, tiles.columns
    if spec.policy == "slices":
        slices = plan_slices(height, width, spec)
        return slices.rows, slices.columns
    return 0, 0
