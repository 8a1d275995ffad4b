"""Pictures on which encoders are compared, and int8's activations are observed: built-in ones, or a user's.

The built-in ones are made by arithmetic, the same on every machine and in every release. They stand for what cameras
see only roughly: smooth areas, hard edges, fine texture, dark and saturated areas. Numbers measured on them compare two
encoders of one model; they do not predict the error on a user's pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import FileError, UsageError
from edgevlm.image import load_image
from edgevlm.preprocess import preprocess_batches
from edgevlm.spec import ImageSpec

#: As many as are decoded at once; more would change little.
MOST_PICTURES = 32
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SEED = 20240229


def pictures(height_px: int, width_px: int) -> NDArray[np.uint8]:
    """The set, already in the encoder's size.

    Returns:
        `images_NHWC`, uint8 [8, height_px, width_px, 3].
    """
    # RandomState rather than default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(_SEED)
    y_HW, x_HW = np.mgrid[0:height_px, 0:width_px]
    u_HW, v_HW = x_HW / max(width_px - 1, 1), y_HW / max(height_px - 1, 1)
    radius_HW = np.hypot(u_HW - 0.5, v_HW - 0.5)
    noise_HWC = random.randint(0, 256, (height_px, width_px, 3))
    gradient_HWC = np.stack([u_HW, v_HW, 1 - u_HW], axis=-1) * 255
    checks_HW = ((x_HW // 12 + y_HW // 12) % 2) * 255
    rings_HW = (np.sin(radius_HW * 60) * 0.5 + 0.5) * 255
    lines_HW = ((y_HW % 16 < 3) & ((x_HW * 7 + y_HW // 16 * 13) % 11 < 6)) * -235 + 245  # like a page of print
    discs_HWC = _discs(random, u_HW, v_HW)
    grey = np.ones(3)
    images = [
        gradient_HWC,
        checks_HW[..., None] * grey,
        rings_HW[..., None] * np.array([1.0, 0.6, 0.2]),
        lines_HW[..., None] * grey,
        discs_HWC,
        0.5 * discs_HWC + 0.5 * noise_HWC,
        gradient_HWC * 0.1 + noise_HWC * 0.05,  # dark and noisy
        np.where((radius_HW < 0.3)[..., None], noise_HWC, np.array([255, 0, 0])),
    ]
    return np.stack([np.clip(np.rint(image_HWC), 0, 255).astype(np.uint8) for image_HWC in images])


def _discs(random: np.random.RandomState, u_HW: NDArray[np.float64], v_HW: NDArray[np.float64]) -> NDArray[np.float64]:
    canvas_HWC = np.full((*u_HW.shape, 3), 200.0)
    for _ in range(24):
        u, v, radius = random.random_sample(3)
        colour = random.randint(0, 256, 3)
        canvas_HWC[np.hypot(u_HW - u, v_HW - v) < 0.02 + radius * 0.15] = colour
    return canvas_HWC


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What encoders are compared on.

    Attributes:
        tiles_TCHW: float32 [3, H, W] each, the encoder's input; of one size, unless it takes any.
        name: What they are, in words.
        record: For `provenance`.
    """

    tiles_TCHW: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    name: str
    record: Mapping[str, Any]


def built_in(image: ImageSpec) -> Pictures:
    """The set as the encoder's input: float32 [8, 3, height_px, width_px], normalised as `image` says."""
    images_NHWC = pictures(image.height_px, image.width_px).astype(np.float32)
    mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
    tiles_NHWC = (images_NHWC * np.float32(image.rescale) - mean) / std
    tiles_TCHW = np.ascontiguousarray(tiles_NHWC.transpose(0, 3, 1, 2))
    return Pictures(tiles_TCHW=tiles_TCHW, name=f"{len(tiles_TCHW)} procedural pictures", record={})


def find_pictures(folder: Path) -> list[Path]:
    """The JPEG, PNG and WebP files of a folder, by name; not those in folders inside it.

    Raises:
        FileError: it is no folder.
        UsageError: there is none, or more than `MOST_PICTURES`.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FileError(f"{folder} is not a folder that can be read: {reason}", code="file.unreadable") from error
    if not 1 <= len(found) <= MOST_PICTURES:
        raise UsageError(
            f"the calibration folder {folder} holds {len(found)} JPEG, PNG or WebP files; "
            f"between 1 and {MOST_PICTURES} are needed"
        )
    return found


def of_files(paths: Sequence[Path], image: ImageSpec) -> Pictures:
    """A user's pictures, prepared as the runtime prepares them.

    Of a picture that is cut into tiles or slices one is taken: that of the whole picture.

    Raises:
        FileError, ImageError: one of them cannot be read.
    """
    tiles = [preprocess_batches(load_image(path), image)[0][-1] for path in paths]
    record = {"files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}}
    count = f"{len(paths)} pictures" if len(paths) > 1 else "one picture"
    return Pictures(tiles_TCHW=tiles, name=f"{count} of {paths[0].absolute().parent.name}", record=record)
