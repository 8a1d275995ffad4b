"""preprocessor_config.json, resolved into the `ImageSpec`: what happens to a picture before the tower sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edgevlm.converters.sections import Section, invalid, unsupported
from edgevlm.families.schema import Processor
from edgevlm.spec import ImageSpec, Resample

# PIL.Image.Resampling; 0 is nearest, which no vision model uses
_RESAMPLES: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def resolve_image(processors: tuple[Processor, ...], data: Mapping[str, Any], *, side_px: int) -> ImageSpec:
    """Resolve one image processor.

    Args:
        processors: The classes that the family knows.
        data: preprocessor_config.json, or the image processor's part of processor_config.json.
        side_px: The side of the square that the tower takes.

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    processor = _find(processors, data)
    section = Section("preprocessor_config.json", data, processor.keys)
    if processor.tiles:
        return _resolve_tiles(section, side_px=side_px)
    crops, pads = section.flag("do_center_crop"), section.flag("do_pad")
    if pads and not processor.pads:
        raise unsupported(f"{section.where}: {processor.names[0]} does not honour do_pad")
    mean, std = triple(section, "image_mean"), triple(section, "image_std")
    height_px, width_px, shortest_px = _geometry(section, crops=crops)
    if (height_px, width_px) != (side_px, side_px):
        raise invalid(f"{section.where} makes pictures of {width_px}x{height_px}, the tower takes {side_px}x{side_px}")
    if pads and shortest_px is None:
        raise unsupported(f"{section.where}: do_pad needs a size with shortest_edge")
    return ImageSpec(
        policy="pad_square" if pads else "stretch" if shortest_px is None else "shortest_crop",
        height_px=height_px,
        width_px=width_px,
        shortest_px=shortest_px,
        resample=section.choice("resample", _RESAMPLES),
        rescale=section.number("rescale_factor"),
        mean=mean,
        std=std,
        pad_rgb=tuple(int(channel * 255) for channel in mean) if pads else None,  # type: ignore[arg-type]
    )


def _resolve_tiles(section: Section, *, side_px: int) -> ImageSpec:
    """Idefics3's way: tiles of `max_image_size`, cut from a picture whose longer side is `size`."""
    tile_px, longest_px = _longest_edge(section, "max_image_size"), _longest_edge(section, "size")
    if tile_px != side_px:
        raise invalid(f"{section.where} makes tiles of {tile_px}x{tile_px}, the tower takes {side_px}x{side_px}")
    return ImageSpec(
        policy="tiles" if section.flag("do_image_splitting") else "longest_stretch",
        height_px=tile_px,
        width_px=tile_px,
        longest_px=longest_px,
        resample=section.choice("resample", _RESAMPLES),
        rescale=section.number("rescale_factor"),
        mean=triple(section, "image_mean"),
        std=triple(section, "image_std"),
    )


def _longest_edge(section: Section, key: str) -> int:
    found = section.get(key)
    value = found["longest_edge"] if isinstance(found, dict) and set(found) == {"longest_edge"} else None
    if type(value) is not int or value < 1:
        raise unsupported(f"{section.where}: {key} is {str(found)[:80]}, only a longest_edge can be used")
    return value


def square(image: ImageSpec, top: Section, key: str) -> ImageSpec:
    """What LLaVA's own code does before the processor (`process_images` in `llava/mm_utils.py`).

    Args:
        image: What the processor alone does.
        top: config.json.
        key: The key that says `pad`, or `square` or nothing for the processor alone.

    Raises:
        CheckpointError: `checkpoint.unsupported`.
    """
    if image.policy != "shortest_crop":
        raise unsupported(f"{key} goes with a processor that crops, this one is {image.policy}")
    if not top.choice(key, {"pad": True, "square": False, None: False}):
        return image
    return dataclasses.replace(
        image,
        policy="pad_square",
        pad_rgb=tuple(int(channel * 255) for channel in image.mean),  # type: ignore[arg-type]
    )


def _find(processors: tuple[Processor, ...], data: Mapping[str, Any]) -> Processor:
    found = data.get("image_processor_type", data.get("feature_extractor_type"))
    plain = str(found).removesuffix("Fast").removesuffix("Pil")
    for processor in processors:
        if plain in processor.names:
            return processor
    supported = ", ".join(name for processor in processors for name in processor.names)
    raise unsupported(f"the image processor is {found!r}, supported are {supported}")


def _geometry(section: Section, *, crops: bool) -> tuple[int, int, int | None]:
    """(height_px, width_px, shortest_px); the last is None for a resize that ignores the aspect ratio."""
    size = section.get("size")
    if type(size) is int:  # old files; what it means depends on the class
        size = (
            {"shortest_edge": size} if "shortest_edge" in section.default("size") else {"height": size, "width": size}
        )
    crop = section.get("crop_size")
    crop = {"height": crop, "width": crop} if type(crop) is int else crop
    for label, box in (("size", size), ("crop_size", crop if crops else {})):
        values = box.values() if isinstance(box, dict) else [None]
        if not all(type(value) is int and 1 <= value <= 1 << 14 for value in values):
            raise invalid(f"{section.where}: {label} is {box!r}")
    if set(size) == {"height", "width"}:
        if crops and crop != size:
            raise unsupported(f"{section.where}: a centre crop to {crop} after a resize to {size}")
        return size["height"], size["width"], None
    if set(size) != {"shortest_edge"} or not crops or set(crop) != {"height", "width"}:
        raise unsupported(f"{section.where}: size {size} with crop {crop if crops else 'off'}")
    if max(crop.values()) > size["shortest_edge"]:
        raise unsupported(f"{section.where}: the crop {crop} is larger than the resized picture {size}")
    return crop["height"], crop["width"], size["shortest_edge"]


def triple(section: Section, key: str) -> tuple[float, float, float]:
    """One number for each of red, green and blue.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    values = section.get(key)
    good = isinstance(values, list) and len(values) == 3
    good = good and all(type(value) in (int, float) and 0 <= value < 10 for value in values)
    # a standard deviation of 0 would divide by zero; a mean of 0 is fine
    if not good or (key.endswith("image_std") and 0 in values):
        raise invalid(f"{section.where}: {key} is {values!r}, three numbers are needed")
    return float(values[0]), float(values[1]), float(values[2])
