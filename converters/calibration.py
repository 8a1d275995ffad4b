"""Pictures made by arithmetic, to measure what an int8 encoder loses: the same on every machine and in every release.

They stand for what cameras see only roughly: smooth areas, hard edges, fine texture, dark and saturated areas. Numbers
measured on them compare two encoders of one model; they do not predict the error on a user's pictures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.spec import ImageSpec

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
    rounded_NHWC: NDArray[np.uint8] = np.clip(np.rint(np.stack(images)), 0, 255).astype(np.uint8)
    return rounded_NHWC


def _discs(random: np.random.RandomState, u_HW: NDArray[np.float64], v_HW: NDArray[np.float64]) -> NDArray[np.float64]:
    canvas_HWC = np.full((*u_HW.shape, 3), 200.0)
    for _ in range(24):
        u, v, radius = random.random_sample(3)
        colour = random.randint(0, 256, 3)
        canvas_HWC[np.hypot(u_HW - u, v_HW - v) < 0.02 + radius * 0.15] = colour
    return canvas_HWC


def tiles(image: ImageSpec) -> NDArray[np.float32]:
    """The set as the encoder's input: float32 [8, 3, height_px, width_px], normalised as `image` says."""
    images_NHWC = pictures(image.height_px, image.width_px).astype(np.float32)
    mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
    tiles_NHWC = (images_NHWC * np.float32(image.rescale) - mean) / std
    return np.ascontiguousarray(tiles_NHWC.transpose(0, 3, 1, 2))
