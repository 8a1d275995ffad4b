"""Pictures that become slices of their own shape: sizes by golden numbers and a reference, pixels by Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_minicpm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny_minicpm import Variant

from edgevlm.errors import BundleError
from edgevlm.preprocess import preprocess_batches
from edgevlm.spec import ImageSpec
from edgevlm.tiling import plan_slices

RELEASED = ImageSpec(
    policy="slices", height_px=448, width_px=448, multiple_px=14, most_tiles=9, resample="bicubic", rescale=1 / 255,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip

#: width, height: overview, (columns, rows), slice; computed with the model's own code, sizes as width, height
GOLDEN = {
    (300, 200): ((546, 364), (0, 0), None),
    (448, 448): ((448, 448), (0, 0), None),
    (640, 480): ((518, 392), (2, 1), (364, 546)),
    (1280, 720): ((602, 336), (3, 2), (490, 406)),
    (720, 1280): ((336, 602), (2, 3), (406, 490)),
    (1920, 1080): ((602, 336), (4, 2), (420, 476)),
    (3000, 1000): ((770, 252), (4, 2), (546, 364)),
    (4000, 3000): ((518, 392), (3, 3), (518, 392)),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_the_plan_is_the_golden_one(size):
    plan = plan_slices(size[1], size[0], RELEASED)
    overview, grid, piece = GOLDEN[size]
    assert (plan.whole_width, plan.whole_height) == overview
    assert (plan.columns, plan.rows) == grid
    assert piece is None or (plan.slice_width, plan.slice_height) == piece


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(448, 9), (448, 1), (56, 4), (70, 9)]))
@settings(max_examples=200, deadline=None)
def test_the_plan_is_the_references(height, width, area):
    spec = ImageSpec(**{**vars(RELEASED), "height_px": area[0], "width_px": area[0], "most_tiles": area[1]})
    plan = plan_slices(height, width, spec)
    # One row of pixels is enough to see sizes, if Pillow is not asked to resize it.
    sizes, grid = _reference_sizes(width, height, Variant(area_px=area[0], most=area[1]))
    assert (plan.columns, plan.rows) == grid
    assert sizes[0] == (plan.whole_width, plan.whole_height)
    assert sizes[1:] == [(plan.slice_width, plan.slice_height)] * (plan.rows * plan.columns)


class _Sized:
    """A picture without pixels: only its size is followed."""

    def __init__(self, size):
        self.size = size

    def resize(self, size, _filter):
        return _Sized(size)

    def crop(self, box):
        assert box[2] <= self.size[0]
        assert box[3] <= self.size[1]
        return _Sized((box[2] - box[0], box[3] - box[1]))


def _reference_sizes(width, height, variant):
    pieces, grid = tiny_minicpm.cut_picture(_Sized((width, height)), variant)
    return [piece.size for piece in pieces], grid


PHOTOGRAPHS = {
    "landscape": load_sample_image("china.jpg"),
    "portrait": np.ascontiguousarray(load_sample_image("flower.jpg").transpose(1, 0, 2)),
    "tiny": np.ascontiguousarray(load_sample_image("china.jpg")[3:10, 5:16]),
    "strip": np.ascontiguousarray(load_sample_image("china.jpg")[200:204]),
    "huge": np.tile(load_sample_image("china.jpg"), (4, 5, 1)),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_pixels_of_photographs_are_pillows(name):
    image = PHOTOGRAPHS[name]
    pieces, _ = tiny_minicpm.cut(image, Variant(area_px=448))
    found = [tile_CHW for tiles_TCHW in preprocess_batches(image, RELEASED) for tile_CHW in tiles_TCHW]
    assert len(found) == len(pieces)
    for tile_CHW, piece in zip(found, pieces, strict=True):
        assert tile_CHW.dtype == np.float32
        assert np.array_equal(tile_CHW, tiny_minicpm.pixels(piece).numpy())
    # The twin: slices of the overview's pixels, or another filter, are other slices.
    other = Image.fromarray(image).resize(pieces[0].size, Image.Resampling.BILINEAR)
    assert not np.array_equal(found[0], tiny_minicpm.pixels(other).numpy())


@pytest.mark.parametrize("missing", ["multiple_px", "most_tiles"])
def test_a_bundle_without_the_numbers_of_slices_is_refused(missing):
    with pytest.raises(BundleError, match=missing):
        plan_slices(10, 10, ImageSpec(**{**vars(RELEASED), missing: None}))
