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
