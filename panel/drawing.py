"""Draws a panel front, seen straight on and without any camera.

All coordinates are panel units: the front is a square of `PANEL` x `PANEL` units, x to the right, y down.
Everything is drawn at `SUPERSAMPLE` pixels per unit and reduced at the end, because Pillow's polygons are
not antialiased.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from panel.truth import GAUGE_MAX, MAX_DIGITS, PanelTruth

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

PANEL = 256
SUPERSAMPLE = 2
GLOW_SIZE = 128  # glow is blurred at this resolution: it has no detail worth more

CELL_WIDTH, CELL_HEIGHT, CELL_PITCH = 32.0, 62.0, 51.0  # of a digit

# Which of the segments a..g of a digit are lit.
SEGMENTS = {
    "0": "abcdef", "1": "bc", "2": "abdeg", "3": "abcdg", "4": "bcfg",
    "5": "acdfg", "6": "acdefg", "7": "abc", "8": "abcdefg", "9": "abcdfg", " ": "",
}  # fmt: skip

# (background, lit segment) per kind of display; the last is a reflective LCD, dark on light.
DISPLAY_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "red": ((24, 8, 8), (255, 56, 40)),
    "green": ((8, 22, 12), (72, 255, 96)),
    "amber": ((26, 16, 6), (255, 176, 40)),
    "blue": ((8, 12, 30), (84, 150, 255)),
    "white": ((16, 18, 20), (236, 244, 255)),
    "lcd": ((166, 178, 150), (28, 34, 30)),
}
LAMP_RGB: dict[str, Colour] = {
    "red": (255, 44, 36),
    "green": (48, 232, 84),
    "yellow": (255, 214, 40),
    "blue": (56, 116, 255),
}
PLATES: tuple[Colour, ...] = (
    (188, 190, 192), (148, 154, 158), (92, 98, 104), (54, 58, 64),
    (206, 198, 180), (70, 88, 104), (98, 112, 96), (222, 222, 216),
)  # fmt: skip
LIGHT_NEEDLES: tuple[Colour, ...] = ((248, 248, 244), (255, 120, 32), (255, 64, 48), (255, 222, 72))
DARK_NEEDLES: tuple[Colour, ...] = ((20, 20, 22), (198, 24, 24), (24, 44, 128), (30, 84, 44))

GAUGE_START_DEG = 135.0  # direction of 0, clockwise from the x axis: lower left
GAUGE_SWEEP_DEG = 270.0


@dataclass(frozen=True)
class Style:
    """How a panel looks, independent of what it shows. Lengths are panel units."""

    plate: Colour
    brushed: bool
    display: str  # key of DISPLAY_COLOURS
    ghost: float  # how much of the lit colour an unlit segment shows, 0..1
    slant: float  # horizontal shear of the digits per unit of height
    stroke: float  # thickness of a segment
    dark_face: bool
    needle: str  # "line", "taper" or "tail"
    needle_colour: Colour
    numerals: int  # step between the numerals of the gauge
    unit: str
    lamp_columns: int
    lamp_off: float  # brightness of an unlit lamp's lens, 0..1
    display_on_top: bool
    gauge_on_left: bool


def sample_style(rng: random.Random, truth: PanelTruth) -> Style:
    """Draw a look for the panel; `truth` only bounds the number of lamp columns."""
    dark_face = rng.random() < 0.5
    return Style(
        plate=rng.choice(PLATES),
        brushed=rng.random() < 0.5,
        display=rng.choice(tuple(DISPLAY_COLOURS)),
        ghost=rng.uniform(0.05, 0.16) if rng.random() < 0.6 else 0.0,
        slant=rng.choice((0.0, 0.06, 0.1, 0.14)),
        stroke=rng.uniform(6.0, 9.0),
        dark_face=dark_face,
        needle=rng.choice(("line", "taper", "tail")),
        needle_colour=rng.choice(LIGHT_NEEDLES if dark_face else DARK_NEEDLES),
        numerals=rng.choice((20, 50)),
        unit=rng.choice(("%", "bar", "kPa", "°C", "psi", "V", "A")),
        lamp_columns=rng.choice((1, 2)) if len(truth.lamps) < 4 else 2,
        lamp_off=rng.uniform(0.22, 0.42),
        display_on_top=rng.random() < 0.6,
        gauge_on_left=rng.random() < 0.5,
    )


@dataclass(frozen=True)
class Layout:
    """Where the parts of a panel are."""

    display: Box
    cells: tuple[Point, ...]  # top left corner of each digit cell, blank ones included
    gauge: Point  # centre
    lamps: tuple[Point, ...]  # centres, in mounting order


def layout_of(truth: PanelTruth, style: Style) -> Layout:
    """Place the parts: the display above or below, the gauge beside the lamps, the lamps on a grid."""
    top = 20.0 if style.display_on_top else 152.0
    display = (20.0, top, 236.0, top + 84.0)
    slots = MAX_DIGITS
    # Centred; a slanted digit leans to the right, the room for its point is on the right too.
    first = PANEL / 2 - CELL_PITCH * slots / 2 + (CELL_PITCH - CELL_WIDTH) / 2 - CELL_HEIGHT * style.slant / 2 - 2
    cell_top = top + (84.0 - CELL_HEIGHT) / 2

    lower_top = 112.0 if style.display_on_top else 14.0
    gauge_x, lamps_x = (79.0, 150.0) if style.gauge_on_left else (177.0, 20.0)
    columns = min(style.lamp_columns, len(truth.lamps))
    rows = math.ceil(len(truth.lamps) / columns)
    places = [divmod(index, columns) for index in range(len(truth.lamps))]
    return Layout(
        display=display,
        cells=tuple((first + index * CELL_PITCH, cell_top) for index in range(slots)),
        gauge=(gauge_x, lower_top + 66.0),
        lamps=tuple(
            (lamps_x + 86.0 * (column + 0.5) / columns, lower_top + 10.0 + 112.0 * (row + 0.5) / rows)
            for row, column in places
        ),
    )


def mix(a: Colour, b: Colour, weight: float) -> Colour:
    """`a` with `weight` (0..1) of `b` blended in."""
    return tuple(round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # Pillow's built-in font: the picture must not depend on the fonts of a machine.
    return ImageFont.load_default(size_px)


class Canvas:
    """A picture in panel units plus a light layer for what glows."""

    def __init__(self, ground: Colour) -> None:
        side = PANEL * SUPERSAMPLE
        self.image = Image.new("RGB", (side, side), ground)
        self._draw = ImageDraw.Draw(self.image)
        self._glow = Image.new("RGB", (GLOW_SIZE, GLOW_SIZE))
        self._glow_draw = ImageDraw.Draw(self._glow)

    def polygon(self, points: list[Point], fill: Colour) -> None:
        self._draw.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill)

    def line(self, a: Point, b: Point, fill: Colour, width: float) -> None:
        ends = [a[0] * SUPERSAMPLE, a[1] * SUPERSAMPLE, b[0] * SUPERSAMPLE, b[1] * SUPERSAMPLE]
        self._draw.line(ends, fill, max(1, round(width * SUPERSAMPLE)))

    def disc(self, centre: Point, radius: float, fill: Colour) -> None:
        x, y = centre
        box = [(x - radius), (y - radius), (x + radius), (y + radius)]
        self._draw.ellipse([v * SUPERSAMPLE for v in box], fill)

    def box(self, box: Box, fill: Colour, radius: float = 0.0) -> None:
        self._draw.rounded_rectangle([v * SUPERSAMPLE for v in box], radius * SUPERSAMPLE, fill)

    def text(self, centre: Point, text: str, fill: Colour, size: float) -> None:
        at = (centre[0] * SUPERSAMPLE, centre[1] * SUPERSAMPLE)
        self._draw.text(at, text, fill, _font(round(size * SUPERSAMPLE)), anchor="mm")

    def glow_polygon(self, points: list[Point], light: Colour) -> None:
        k = GLOW_SIZE / PANEL
        self._glow_draw.polygon([(x * k, y * k) for x, y in points], light)

    def glow_disc(self, centre: Point, radius: float, light: Colour) -> None:
        k = GLOW_SIZE / PANEL
        box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
        self._glow_draw.ellipse([v * k for v in box], light)

    def finish(self) -> Image.Image:
        """The panel at one pixel per unit, RGB, with the glow added."""
        glow = self._glow.filter(ImageFilter.GaussianBlur(3.0)).resize((PANEL, PANEL), Image.Resampling.BILINEAR)
        return ImageChops.screen(self.image.reduce(SUPERSAMPLE), glow)


def draw_panel(truth: PanelTruth, style: Style, rng: random.Random) -> Image.Image:
    """Draw the panel's front: RGB, `PANEL` x `PANEL` pixels. `rng` only places scratches and screws' slots."""
    canvas = Canvas(style.plate)
    layout = layout_of(truth, style)
    _draw_plate(canvas, style, rng)
    draw_display(canvas, layout, truth.display, style)
    draw_gauge(canvas, layout.gauge, truth.gauge, style)
    draw_lamps(canvas, layout.lamps, truth, style)
    return canvas.finish()


def _draw_plate(canvas: Canvas, style: Style, rng: random.Random) -> None:
    if style.brushed:
        for _ in range(90):
            y = rng.uniform(0, PANEL)
            shade = mix(style.plate, rng.choice(((0, 0, 0), (255, 255, 255))), rng.uniform(0.02, 0.07))
            start = rng.uniform(-60, PANEL)
            canvas.line((start, y), (start + rng.uniform(40, 220), y), shade, 0.5)
    for x in (10.0, PANEL - 10.0):
        for y in (10.0, PANEL - 10.0):
            canvas.disc((x, y), 5.0, mix(style.plate, (0, 0, 0), 0.45))
            canvas.disc((x - 0.4, y - 0.4), 4.0, (176, 178, 180))
            angle = rng.uniform(0, math.pi)
            dx, dy = 3.2 * math.cos(angle), 3.2 * math.sin(angle)
            canvas.line((x - dx, y - dy), (x + dx, y + dy), (84, 86, 88), 1.2)


def _segment_polygons(cell: Point, style: Style) -> dict[str, list[Point]]:
    """Hexagons of the seven segments of one digit cell, slanted, by segment letter."""
    (left, top), width, height = cell, CELL_WIDTH, CELL_HEIGHT
    half, gap = style.stroke / 2, 0.7
    x0, x1 = left + half, left + width - half
    y0, y1, y2 = top + half, top + height / 2, top + height - half

    def across(y: float) -> list[Point]:
        a, b = x0 + gap, x1 - gap
        return [(a, y), (a + half, y - half), (b - half, y - half), (b, y), (b - half, y + half), (a + half, y + half)]

    def down(x: float, upper: float, lower: float) -> list[Point]:
        a, b = upper + gap, lower - gap
        return [(x, a), (x + half, a + half), (x + half, b - half), (x, b), (x - half, b - half), (x - half, a + half)]

    upright = {
        "a": across(y0), "g": across(y1), "d": across(y2),
        "f": down(x0, y0, y1), "b": down(x1, y0, y1), "e": down(x0, y1, y2), "c": down(x1, y1, y2),
    }  # fmt: skip
    bottom = top + height
    return {name: [(x + (bottom - y) * style.slant, y) for x, y in points] for name, points in upright.items()}


def draw_display(canvas: Canvas, layout: Layout, text: str, style: Style) -> None:
    """Draw a seven-segment display that shows `text`, right-aligned in its digit positions."""
    ground, lit = DISPLAY_COLOURS[style.display]
    left, top, right, bottom = layout.display
    canvas.box((left - 4, top - 4, right + 4, bottom + 4), mix(style.plate, (0, 0, 0), 0.6), 7)
    canvas.box((left - 4, top - 2, right + 4, bottom + 4), (34, 35, 38), 7)
    canvas.box(layout.display, ground, 4)
    ghost = mix(ground, lit, style.ghost)
    glows = style.display != "lcd"
    light = mix((0, 0, 0), lit, 0.55)

    digits = text.replace(".", "").rjust(MAX_DIGITS)
    # The point belongs to the digit before it; with no point, index -1 matches no position.
    point_after = MAX_DIGITS - len(text.split(".")[1]) - 1 if "." in text else -1
    for index, (digit, cell) in enumerate(zip(digits, layout.cells, strict=True)):
        for name, points in _segment_polygons(cell, style).items():
            on = name in SEGMENTS[digit]
            canvas.polygon(points, lit if on else ghost)
            if on and glows:
                canvas.glow_polygon(points, light)
        radius = max(5.0, style.stroke * 0.65)
        dot = (cell[0] + (CELL_WIDTH + CELL_PITCH) / 2 + 1.0, cell[1] + CELL_HEIGHT - radius)
        on = index == point_after
        canvas.disc(dot, radius, lit if on else ghost)
        if on and glows:
            canvas.glow_disc(dot, radius, light)


def gauge_direction(value: float) -> Point:
    """Unit vector (x right, y down) in which the needle points at `value`."""
    angle = math.radians(GAUGE_START_DEG + GAUGE_SWEEP_DEG * value / GAUGE_MAX)
    return math.cos(angle), math.sin(angle)


def draw_gauge(canvas: Canvas, centre: Point, value: float, style: Style) -> None:
    """Draw a round dial with a 270 degree scale from 0 (lower left) clockwise to 100 (lower right)."""
    radius = 60.0
    face, ink = ((26, 28, 32), (226, 228, 230)) if style.dark_face else ((240, 238, 230), (34, 34, 38))
    canvas.disc((centre[0] + 1.5, centre[1] + 2.0), radius, mix(style.plate, (0, 0, 0), 0.4))
    canvas.disc(centre, radius, (58, 60, 64))
    canvas.disc((centre[0] - 0.8, centre[1] - 0.8), radius - 1.5, (142, 144, 148))
    canvas.disc(centre, radius - 4, face)

    def at(mark: float, distance: float) -> Point:
        dx, dy = gauge_direction(mark)
        return centre[0] + dx * distance, centre[1] + dy * distance

    rim = radius - 7
    for mark in range(0, GAUGE_MAX + 1, 5):
        major = mark % 10 == 0
        canvas.line(at(mark, rim - (8 if major else 4)), at(mark, rim), ink, 1.6 if major else 0.9)
    for mark in range(0, GAUGE_MAX + 1, style.numerals):
        canvas.text(at(mark, rim - 15), str(mark), ink, 9)
    canvas.text((centre[0], centre[1] + radius * 0.55), style.unit, mix(face, ink, 0.75), 9)
    _draw_needle(canvas, centre, rim, value, style)


def _draw_needle(canvas: Canvas, centre: Point, length: float, value: float, style: Style) -> None:
    dx, dy = gauge_direction(value)

    def at(along: float, across: float) -> Point:
        return centre[0] + dx * along - dy * across, centre[1] + dy * along + dx * across

    tip = length - 3
    if style.needle == "line":
        canvas.polygon([at(0, -1.6), at(tip, -1.3), at(tip, 1.3), at(0, 1.6)], style.needle_colour)
    elif style.needle == "taper":
        canvas.polygon([at(0, -3.6), at(tip, -0.4), at(tip, 0.4), at(0, 3.6)], style.needle_colour)
    else:
        canvas.polygon([at(-13, -2.6), at(tip, -0.6), at(tip, 0.6), at(-13, 2.6)], style.needle_colour)
    hub = (40, 42, 46) if not style.dark_face else (150, 152, 156)
    canvas.disc(centre, 5.5, hub)
    canvas.disc((centre[0] - 0.8, centre[1] - 0.8), 3.2, mix(hub, (255, 255, 255), 0.25))


def draw_lamps(canvas: Canvas, centres: tuple[Point, ...], truth: PanelTruth, style: Style) -> None:
    """Draw the lamps, smaller where more than two stand on top of each other."""
    rows = len({y for _, y in centres})
    radius = 15.0 if rows < 3 else 12.5
    for (x, y), lamp in zip(centres, truth.lamps, strict=True):
        colour = LAMP_RGB[lamp.colour]
        canvas.disc((x + 1, y + 1.5), radius + 4, mix(style.plate, (0, 0, 0), 0.4))
        canvas.disc((x, y), radius + 4, (78, 80, 84))
        canvas.disc((x - 0.6, y - 0.6), radius + 2.5, (160, 162, 166))
        canvas.disc((x, y), radius, mix((10, 10, 12), colour, 0.92 if lamp.lit else style.lamp_off * 0.8))
        if lamp.lit:
            canvas.disc((x, y), radius * 0.55, mix(colour, (255, 255, 255), 0.6))
            canvas.glow_disc((x, y), radius + 3, mix((0, 0, 0), colour, 0.6))
        else:
            canvas.disc((x, y), radius * 0.7, mix((10, 10, 12), colour, style.lamp_off))
            canvas.disc((x - radius * 0.35, y - radius * 0.35), radius * 0.2, mix(colour, (255, 255, 255), 0.35))
