"""Preprocessing against the reference processors' PIL back end, bit for bit, on photographs."""

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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgevlm.errors import BundleError, ImageError
from edgevlm.preprocess import plan_image, preprocess
from edgevlm.spec import ImageSpec

Array = NDArray[Any]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SIGLIP = ImageSpec(
    policy="stretch",
    height_px=384,
    width_px=384,
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
CLIP = ImageSpec(
    policy="shortest_crop",
    height_px=336,
    width_px=336,
    shortest_px=336,
    resample="bicubic",
    rescale=1 / 255,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
LLAVA = dataclasses.replace(CLIP, policy="pad_square", pad_rgb=(122, 116, 104))  # int(255 * mean), as LLaVA has it
SPECS = {"siglip": SIGLIP, "clip": CLIP, "llava": LLAVA}


def reference(image_HWC: Array, spec: ImageSpec) -> Array:
    """`pixel_values` (1, 3, H, W) of the reference processor; every number is passed, no default is trusted."""
    numbers = {
        "resample": Image.Resampling[spec.resample.upper()],
        "rescale_factor": spec.rescale,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    tile = {"height": spec.height_px, "width": spec.width_px}
    if spec.policy == "stretch":
        processor: Any = SiglipImageProcessorPil(size=tile, **numbers)
    elif spec.policy == "shortest_crop":
        processor = CLIPImageProcessorPil(size={"shortest_edge": spec.shortest_px}, crop_size=tile, **numbers)
    else:
        processor = LlavaImageProcessorPil(
            size={"shortest_edge": spec.shortest_px}, crop_size=tile, do_pad=True, **numbers
        )
    return np.asarray(processor(Image.fromarray(image_HWC), return_tensors="np")["pixel_values"])


def assert_bit_equal(found: Array, expected: Array) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


PHOTOGRAPHS = {
    "astronaut, square": photographs.astronaut(),
    "coffee, landscape": photographs.coffee(),
    "chelsea, landscape": photographs.chelsea(),
    "china, landscape": load_sample_image("china.jpg"),
    "flower, portrait": np.ascontiguousarray(load_sample_image("flower.jpg").transpose(1, 0, 2)),
    "flower, narrow": np.ascontiguousarray(load_sample_image("flower.jpg")[:, 100:231]),
    "china, odd and small": np.ascontiguousarray(load_sample_image("china.jpg")[3:104, 5:82]),
    "china, strip": np.ascontiguousarray(load_sample_image("china.jpg")[200:203]),
    "one pixel": np.array([[[200, 100, 50]]], dtype=np.uint8),
}


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_photographs_equal_the_reference(photograph: str, family: str) -> None:
    image_HWC, spec = PHOTOGRAPHS[photograph], SPECS[family]
    assert_bit_equal(preprocess(image_HWC, spec), reference(image_HWC, spec))


@pytest.mark.parametrize("family", SPECS)
def test_the_comparison_sees_one_damaged_pixel(family: str) -> None:
    image_HWC, spec = photographs.astronaut(), SPECS[family]
    damaged_HWC = image_HWC.copy()
    damaged_HWC[256, 256, 1] ^= 128
    with pytest.raises(AssertionError):
        assert_bit_equal(preprocess(damaged_HWC, spec), reference(image_HWC, spec))


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("change", [{"rescale": 0.0039}, {"mean": (0.5, 0.5, 0.51)}, {"resample": "bilinear"}])
def test_the_comparison_sees_a_changed_number(family: str, change: dict[str, Any]) -> None:
    image_HWC, spec = photographs.chelsea(), SPECS[family]
    with pytest.raises(AssertionError):
        assert_bit_equal(preprocess(image_HWC, dataclasses.replace(spec, **change)), reference(image_HWC, spec))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 48),
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from(["box", "bilinear", "hamming", "bicubic", "lanczos"]),
    st.integers(0, 1000),
)
def test_any_size_equals_the_reference(
    family: str, height: int, width: int, tile_height: int, tile_width: int, shortest: int, resample: Any, seed: int
) -> None:
    """Also tiles larger than the resized picture, where the reference pads with zeros, along one axis or both."""
    image_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    spec = dataclasses.replace(SPECS[family], height_px=tile_height, width_px=tile_width, resample=resample)
    if spec.policy != "stretch":
        spec = dataclasses.replace(spec, shortest_px=shortest)
    assert_bit_equal(preprocess(image_HWC, spec), reference(image_HWC, spec))


@pytest.mark.parametrize(
    ("mean", "std", "rescale"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255),
        (CLIP_MEAN, CLIP_STD, 0.00392156862745098),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 127.5),
    ],
)
def test_all_256_values_equal_the_reference(mean: Any, std: Any, rescale: float) -> None:
    """Every sample value in every channel, unresized: the table itself."""
    ramp_HWC = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    spec = dataclasses.replace(SIGLIP, height_px=16, width_px=16, mean=mean, std=std, rescale=rescale)
    assert_bit_equal(preprocess(ramp_HWC, spec), reference(ramp_HWC, spec))


def test_padding_equals_the_original_llava() -> None:
    """LLaVA's own `expand2square`, by PIL: the picture is pasted at half the difference, rounded down."""
    image_HWC = np.ascontiguousarray(photographs.chelsea()[:200, :301])
    square = Image.new("RGB", (301, 301), LLAVA.pad_rgb)
    square.paste(Image.fromarray(image_HWC), (0, (301 - 200) // 2))
    assert_bit_equal(preprocess(image_HWC, LLAVA), reference(np.asarray(square), CLIP))


# ---- the plan ----


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (SIGLIP, (3000, 4000), {"resized_height": 384, "resized_width": 384, "top": 0, "left": 0, "rows": 384}),
        (CLIP, (3000, 4000), {"resized_height": 336, "resized_width": 448, "left": 56, "columns": 336}),
        (CLIP, (4000, 3000), {"resized_height": 448, "resized_width": 336, "top": 56, "rows": 336}),
        (CLIP, (427, 640), {"resized_width": 503, "left": 83}),  # 503.6 is cut, not rounded
        (CLIP, (1, 1), {"resized_height": 336, "resized_width": 336}),
        (LLAVA, (3000, 4000), {"padded_height": 4000, "pad_top": 500, "pad_left": 0, "resized_height": 336}),
        (LLAVA, (10, 7), {"padded_width": 10, "pad_left": 1, "pad_top": 0}),
        (dataclasses.replace(CLIP, shortest_px=333), (9, 9), {"top": 0, "tile_top": 2, "rows": 333}),
    ],
)
def test_plan(spec: ImageSpec, size: tuple[int, int], expected: dict[str, int]) -> None:
    plan = dataclasses.asdict(plan_image(*size, spec))
    assert {name: plan[name] for name in expected} == expected


def test_a_panorama_costs_no_more_than_its_centre() -> None:
    """16384 x 1 pixels become 336 x 5 million before the crop; only the crop may be computed."""
    strip_HWC = np.zeros((1, 16384, 3), dtype=np.uint8)
    assert preprocess(strip_HWC, CLIP).shape == (1, 3, 336, 336)


# ---- refusals ----


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), "x"])
def test_only_uint8_rgb(bad: Any) -> None:
    with pytest.raises(ImageError) as caught:
        preprocess(bad, SIGLIP)
    assert caught.value.code == "image.array"


@pytest.mark.parametrize("change", [{"policy": "shortest_crop"}, {"policy": "pad_square", "shortest_px": 384}])
def test_a_policy_without_its_number(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="is missing") as caught:
        preprocess(photographs.chelsea(), dataclasses.replace(SIGLIP, **change))
    assert caught.value.code == "bundle.invalid"
