"""Pictures that become tiles, against SmolVLM's and Idefics3's processors (PIL back end): sizes and pixels, exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_image
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgevlm import kernels
from edgevlm.errors import BundleError
from edgevlm.preprocess import preprocess
from edgevlm.spec import ImageSpec
from edgevlm.tiling import plan_tiles

Array = NDArray[Any]
PROCESSORS = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}

SPLIT = ImageSpec(
    policy="tiles",
    height_px=96,
    width_px=96,
    longest_px=384,
    resample="lanczos",
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
WHOLE = dataclasses.replace(SPLIT, policy="longest_stretch")
RELEASED = dataclasses.replace(SPLIT, height_px=512, width_px=512, longest_px=2048)


def processor(spec: ImageSpec, kind: str = "smolvlm") -> Any:
    """The reference, every number passed: no default is trusted."""
    return PROCESSORS[kind](
        size={"longest_edge": spec.longest_px},
        max_image_size={"longest_edge": spec.height_px},
        do_image_splitting=spec.policy == "tiles",
        resample=Image.Resampling[spec.resample.upper()],
        rescale_factor=spec.rescale,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


def assert_equal(image_HWC: Array, spec: ImageSpec, kind: str = "smolvlm") -> None:
    made = processor(spec, kind)(Image.fromarray(image_HWC), return_tensors="np", return_row_col_info=True)
    found, expected = preprocess(image_HWC, spec), made["pixel_values"][0]
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected)
    plan = plan_tiles(*image_HWC.shape[:2], spec)
    assert ([[plan.rows]], [[plan.columns]]) == (made["rows"], made["cols"])
    assert plan.n_tiles == len(expected)


PHOTOGRAPHS = {
    "square": photographs.astronaut(),
    "landscape": load_sample_image("china.jpg"),
    "portrait": np.ascontiguousarray(load_sample_image("flower.jpg").transpose(1, 0, 2)),
    "tiny": np.ascontiguousarray(load_sample_image("china.jpg")[3:10, 5:16]),
    "strip": np.ascontiguousarray(load_sample_image("china.jpg")[200:203]),
    "column": np.ascontiguousarray(load_sample_image("china.jpg")[:, 200:201]),
    "huge": np.tile(load_sample_image("china.jpg"), (4, 5, 1)),
    "one pixel": np.array([[[200, 100, 50]]], dtype=np.uint8),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("spec", [SPLIT, WHOLE], ids=lambda spec: spec.policy)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_photographs_equal_the_reference(photograph: str, spec: ImageSpec, kind: str) -> None:
    assert_equal(PHOTOGRAPHS[photograph], spec, kind)


def test_a_photograph_at_the_released_sizes() -> None:
    assert_equal(PHOTOGRAPHS["landscape"], RELEASED)


def test_the_comparison_can_fail() -> None:
    image_HWC = PHOTOGRAPHS["square"]
    damaged_HWC = image_HWC.copy()
    damaged_HWC[256, 256, 1] ^= 128
    expected = processor(SPLIT)(Image.fromarray(image_HWC), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(preprocess(image_HWC, SPLIT), expected)
    for other in (
        preprocess(damaged_HWC, SPLIT),
        preprocess(image_HWC, dataclasses.replace(SPLIT, resample="bicubic")),
        np.roll(preprocess(image_HWC, SPLIT), 1, axis=0),
    ):
        assert not np.array_equal(other, expected)


def test_the_rounding_between_the_two_resizes_shows() -> None:
    """One resize to the last size would be faster, and is another picture."""
    image_HWC = PHOTOGRAPHS["landscape"]
    plan = plan_tiles(*image_HWC.shape[:2], SPLIT)
    assert (plan.first_height, plan.first_width) != (plan.last_height, plan.last_width)
    once_HWC = kernels.resize(image_HWC, plan.last_height, plan.last_width, "lanczos")
    assert not np.array_equal(preprocess(once_HWC, SPLIT), preprocess(image_HWC, SPLIT))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["tiles", "longest_stretch"]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.integers(1, 120),
    st.sampled_from(["bilinear", "bicubic", "lanczos"]),
    st.integers(0, 1000),
)
def test_any_size_equals_the_reference(
    policy: Any, height: int, width: int, tile: int, longest: int, resample: Any, seed: int
) -> None:
    image_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    spec = dataclasses.replace(
        SPLIT, policy=policy, height_px=tile, width_px=tile, longest_px=longest, resample=resample
    )
    assert_equal(image_HWC, spec)


#: models.md 12.3: (width, height) -> first and last size, (rows, columns); for tiles of 512 of 2048 and of 384 of 1536
GOLDEN = {
    (300, 200): ((2048, 1366), (2048, 1536), (3, 4), (1536, 1024), (1536, 1152)),
    (512, 512): ((2048, 2048), (2048, 2048), (4, 4), (1536, 1536), (1536, 1536)),
    (640, 480): ((2048, 1536), (2048, 1536), (3, 4), (1536, 1152), (1536, 1152)),
    (1280, 720): ((2048, 1152), (2048, 1536), (3, 4), (1536, 864), (1536, 1152)),
    (720, 1280): ((1152, 2048), (1536, 2048), (4, 3), (864, 1536), (1152, 1536)),
    (3000, 1000): ((2048, 682), (2048, 1024), (2, 4), (1536, 512), (1536, 768)),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_the_released_sizes(size: tuple[int, int]) -> None:
    first, last, grid, small_first, small_last = GOLDEN[size]
    for spec, sizes in (
        (RELEASED, (first, last)),
        (dataclasses.replace(RELEASED, height_px=384, width_px=384, longest_px=1536), (small_first, small_last)),
    ):
        plan = plan_tiles(size[1], size[0], spec)
        assert ((plan.first_width, plan.first_height), (plan.last_width, plan.last_height)) == sizes
        assert (plan.rows, plan.columns) == grid
        assert plan.n_tiles == grid[0] * grid[1] + 1


class Sizes:
    """Stands for a picture in the reference's resize, which then only computes sizes."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (3, height, width)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40000), st.integers(1, 40000), st.integers(1, 8192), st.sampled_from([14, 364, 384, 512]))
def test_sizes_up_to_the_limits(height: int, width: int, longest: int, tile: int) -> None:
    """Sizes whose pixels nobody wants to compute; above 4096 the reference has a limit of its own."""
    from transformers.models.smolvlm import image_processing_pil_smolvlm as module

    spec = dataclasses.replace(SPLIT, height_px=tile, width_px=tile, longest_px=longest)
    plan = plan_tiles(height, width, spec)
    first = module.get_resize_output_image_size(Sizes(height, width), longest)
    assert (plan.first_height, plan.first_width) == first
    asked: list[SizeDict] = []
    reference = processor(spec)
    reference.resize = lambda image, size, resample: asked.append(size)
    reference.resize_for_vision_encoder(Sizes(*first), tile)
    assert (plan.last_height, plan.last_width) == (asked[0].height, asked[0].width)


def test_a_spec_without_its_number_is_refused() -> None:
    with pytest.raises(BundleError, match="longest_px"):
        preprocess(PHOTOGRAPHS["tiny"], dataclasses.replace(SPLIT, longest_px=None))
