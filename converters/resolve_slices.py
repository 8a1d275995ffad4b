"""How pictures become slices of their own shape, resolved into the `ImageSpec`: MiniCPM-V's section and its processor.

Both files may say it; the first releases have no processor file at all. Where both speak they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.converters.resolve_image import triple
from edgevlm.converters.sections import Section, invalid, unsupported
from edgevlm.families.schema import Vision
from edgevlm.spec import ImageSpec

_SIZES = ("max_slice_nums", "scale_resolution", "patch_size")


def resolve_slices(declared: Vision, top: Section, processor: Mapping[str, Any], *, patch_px: int) -> ImageSpec:
    """Resolve the slicing of pictures.

    Args:
        declared: The family's vision part; its `slices` names the section of config.json.
        top: config.json.
        processor: preprocessor_config.json; empty if there is none, which means its class's defaults.
        patch_px: The side of a patch of the tower.

    Raises:
        CheckpointError: `checkpoint.invalid` for contradictions, `checkpoint.unsupported` for another processor.
    """
    (known,) = declared.processors
    found = processor.get("image_processor_type", known.names[0])
    if found not in known.names:
        raise unsupported(f"the image processor is {found!r}, supported are {', '.join(known.names)}")
    settings = Section("preprocessor_config.json", processor, known.keys)
    section = Section(f"config.json: {declared.slices}", top.get(declared.slices), declared.slice_keys)
    n_most, side_px, slice_patch_px = (section.size(key, 4096) for key in _SIZES)
    if processor:
        said = (*(settings.size(key) for key in _SIZES), settings.size("image_feature_size"))
        if said != (n_most, side_px, slice_patch_px, top.size("query_num")):
            raise invalid(
                f"{settings.where} says {said[0]} slices of {said[1]} pixels, patches of {said[2]} and {said[3]} rows, "
                f"config.json says {n_most} of {side_px}, {slice_patch_px} and {top.size('query_num')}"
            )
    if {slice_patch_px, top.size("patch_size")} != {patch_px}:
        said_px = f"{slice_patch_px} in {declared.slices} and {top.size('patch_size')} at its top"
        raise invalid(f"config.json says patches of {patch_px} for the tower, {said_px}")
    if side_px < patch_px:
        raise invalid(f"{section.where} makes slices of {side_px} pixels, one patch has {patch_px}")
    return ImageSpec(
        policy="slices",
        height_px=side_px,
        width_px=side_px,
        resample="bicubic",
        rescale=1 / 255,
        mean=triple(settings, "norm_mean"),
        std=triple(settings, "norm_std"),
        multiple_px=patch_px,
        most_tiles=n_most,
    )
