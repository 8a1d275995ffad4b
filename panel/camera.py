"""A cheap camera: it sees a drawn panel from a hand's angle, slightly soft, noisy and unevenly lit."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageFilter

from panel.drawing import PANEL, Colour, Point

Range = tuple[float, float]

VIEW = 256  # side of the picture in pixels
PANEL_CORNERS: tuple[Point, ...] = ((0, 0), (PANEL, 0), (PANEL, PANEL), (0, PANEL))  # clockwise from the top left
WALLS: tuple[Colour, ...] = (
    (120, 118, 112), (70, 74, 80), (164, 156, 144), (44, 44, 48), (196, 196, 192), (96, 84, 72),
)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """The ranges from which one shot's impairments are drawn.

    `rotation` in degrees (either way), `perspective` as a corner's displacement over the picture's side,
    `blur` as the standard deviation in pixels, `noise` as the standard deviation in grey levels,
    `unevenness` as the light's relative drop across the picture, `quality` as JPEG quality.
    """

    rotation: Range = (0.0, 1.5)
    perspective: Range = (0.0, 0.01)
    blur: Range = (0.0, 0.5)
    noise: Range = (0.0, 2.5)
    unevenness: Range = (0.0, 0.15)
    quality: Range = (85.0, 95.0)


CAMERAS = {
    "clean": Camera(),
    "blurred": Camera(blur=(1.2, 2.4)),
    "tilted": Camera(rotation=(3.0, 7.0), perspective=(0.02, 0.05)),
    "noisy": Camera(noise=(9.0, 20.0), unevenness=(0.2, 0.45), quality=(40.0, 70.0)),
}
MIXED = "mixed"
DIFFICULTIES = (*CAMERAS, MIXED)


def _draw_shot(difficulty: str, rng: random.Random) -> dict[str, float]:
    """One value per impairment; `mixed` takes each from a difficulty of its own, so that they combine."""
    cameras = list(CAMERAS.values())
    shot = {}
    for field in fields(Camera):
        camera = rng.choice(cameras) if difficulty == MIXED else CAMERAS[difficulty]
        shot[field.name] = rng.uniform(*getattr(camera, field.name))
    return shot


def _aim(seed: int, difficulty: str) -> tuple[random.Random, dict[str, float], list[Point]]:
    """The shot's random source, its impairments and where the panel's corners land in the picture."""
    # The panel itself depends on the seed only; the shot on the seed and the difficulty.
    rng = random.Random(f"{difficulty}/{seed}")
    shot = _draw_shot(difficulty, rng)
    return rng, shot, _corners(shot, rng)


def project(points: list[Point], seed: int, difficulty: str) -> list[Point]:
    """Where points of the panel (panel units) are in the picture of this shot (pixels)."""
    _, _, corners = _aim(seed, difficulty)
    a, b, c, d, e, f, g, h = _homography(list(PANEL_CORNERS), corners)
    return [((a * x + b * y + c) / (g * x + h * y + 1), (d * x + e * y + f) / (g * x + h * y + 1)) for x, y in points]


def photograph(front: Image.Image, seed: int, difficulty: str) -> bytes:
    """Take a picture of a panel front (RGB, square): the bytes of a `VIEW` x `VIEW` JPEG.

    The same `seed` and `difficulty` give the same bytes.
    """
    rng, shot, corners = _aim(seed, difficulty)
    picture = _place(front, corners, rng.choice(WALLS))
    if shot["blur"] > 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(shot["blur"]))
    picture = _expose(picture, shot, rng)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=round(shot["quality"]))
    return data.getvalue()


def _corners(shot: dict[str, float], rng: random.Random) -> list[Point]:
    """Where the panel's corners (top left, then clockwise) land in the picture, in pixels."""
    angle = math.radians(shot["rotation"]) * rng.choice((-1, 1))
    bend = shot["perspective"]
    corners = []
    for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        x += 2 * bend * rng.uniform(-1, 1)
        y += 2 * bend * rng.uniform(-1, 1)
        corners.append((x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)))
    # The whole panel stays in view: scale the turned outline to fill most of the picture, then shift it.
    lows = [min(corner[axis] for corner in corners) for axis in (0, 1)]
    highs = [max(corner[axis] for corner in corners) for axis in (0, 1)]
    extent = VIEW * rng.uniform(0.9, 0.98)
    scale = extent / max(highs[0] - lows[0], highs[1] - lows[1])
    slack = [VIEW - (high - low) * scale for low, high in zip(lows, highs, strict=True)]
    offset = [s * rng.uniform(0.3, 0.7) - low * scale for s, low in zip(slack, lows, strict=True)]
    return [(x * scale + offset[0], y * scale + offset[1]) for x, y in corners]


def _homography(sources: list[Point], targets: list[Point]) -> list[float]:
    """a..h of the map (x, y) -> ((ax + by + c) / (gx + hy + 1), (dx + ey + f) / (gx + hy + 1)) of four points."""
    rows, values = [], []
    for (x, y), (u, v) in zip(sources, targets, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64)).tolist()


def _place(front: Image.Image, corners: list[Point], wall: Colour) -> Image.Image:
    """Warp the front so that its corners land on `corners`, and put it with its shadow on a wall."""
    # Pillow asks from which point of the front each pixel of the picture comes.
    coefficients = _homography(corners, list(PANEL_CORNERS))
    size = (VIEW, VIEW)
    warped = front.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    # One dark pixel all around, so that interpolation makes the panel's edge smooth.
    inside = Image.new("L", front.size, 0)
    inside.paste(255, (1, 1, PANEL - 1, PANEL - 1))
    mask = inside.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    picture = Image.new("RGB", size, wall)
    shadow = mask.filter(ImageFilter.BoxBlur(4)).point(lambda level: level // 2)
    picture.paste((0, 0, 0), (3, 5), shadow)
    picture.paste(warped, (0, 0), mask)
    return picture


def _expose(picture: Image.Image, shot: dict[str, float], rng: random.Random) -> Image.Image:
    """Apply uneven light, exposure, white balance and sensor noise."""
    image_HWC = np.asarray(picture, np.float32)
    ramp = np.linspace(-0.5, 0.5, VIEW, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    light_HW = 1 + shot["unevenness"] * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
    exposure = rng.uniform(0.82, 1.12)
    balance_C = np.array([exposure * rng.uniform(0.95, 1.05) for _ in range(3)], np.float32)
    image_HWC = image_HWC * (light_HW[:, :, None] * balance_C).astype(np.float32)
    if shot["noise"] > 0:
        noise = np.random.default_rng(rng.getrandbits(64))
        image_HWC += noise.standard_normal(image_HWC.shape, np.float32) * np.float32(shot["noise"])
    return Image.fromarray(np.clip(image_HWC + 0.5, 0, 255).astype(np.uint8))
