"""Scenes: a panel with known truth, photographed. ``python -m panel.scenes sheet.png`` draws a contact sheet."""

from __future__ import annotations

import argparse
import io
import random
from dataclasses import dataclass

from PIL import Image

from panel.camera import DIFFICULTIES, MIXED, VIEW, photograph, project
from panel.drawing import CELL_HEIGHT, CELL_WIDTH, Style, draw_panel, layout_of, sample_style
from panel.truth import LAMP_COLOURS, PanelTruth, sample_truth


@dataclass(frozen=True)
class Scene:
    """A photographed panel and what it shows. `jpeg` is a `VIEW` x `VIEW` picture."""

    seed: int
    difficulty: str
    truth: PanelTruth
    jpeg: bytes

    def image(self) -> Image.Image:
        """The decoded picture, RGB."""
        return Image.open(io.BytesIO(self.jpeg)).convert("RGB")


@dataclass(frozen=True)
class Landmark:
    """One part of a panel as the picture shows it; `x` and `y` are the part's centre, -1..1 across the picture."""

    kind: str  # "digit", "gauge" or "lamp"
    x: float
    y: float
    value: int  # the digit; the gauge's value; twice the index of the lamp's colour, plus 1 if lit
    index: int  # of a digit: its position, from the left
    point: bool  # of a digit: a decimal point follows


def make_scene(seed: int, difficulty: str = MIXED) -> Scene:
    """Make the scene of a seed. Truth and looks depend on the seed alone, the shot on the difficulty too."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty {difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
    truth, style, rng = _plan(seed)
    return Scene(seed, difficulty, truth, photograph(draw_panel(truth, style, rng), seed, difficulty))


def _plan(seed: int) -> tuple[PanelTruth, Style, random.Random]:
    """Truth and look of a seed's panel, and the random source for the rest of it."""
    rng = random.Random(seed)
    truth = sample_truth(rng)
    return truth, sample_style(rng, truth), rng


def find_landmarks(seed: int, difficulty: str = MIXED) -> list[Landmark]:
    """The digits, the gauge and the lamps of a scene, in this order, without drawing it."""
    truth, style, _ = _plan(seed)
    layout = layout_of(truth, style)
    digits = [char for char in truth.display if char != "."]
    point_after = truth.display.find(".") - 1
    cells = layout.cells[-len(digits) :]
    found = [
        ("digit", (x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2), int(digit))
        for digit, (x, y) in zip(digits, cells, strict=True)
    ]
    found.append(("gauge", layout.gauge, truth.gauge))
    states = [2 * LAMP_COLOURS.index(lamp.colour) + lamp.lit for lamp in truth.lamps]
    found += [("lamp", centre, state) for centre, state in zip(layout.lamps, states, strict=True)]
    places = project([point for _, point, _ in found], seed, difficulty)
    return [
        Landmark(kind, 2 * x / VIEW - 1, 2 * y / VIEW - 1, value, index, kind == "digit" and index == point_after)
        for index, ((kind, _, value), (x, y)) in enumerate(zip(found, places, strict=True))
    ]


def contact_sheet(first_seed: int, columns: int = 6) -> Image.Image:
    """One row of scenes per difficulty, the same panels in each column."""
    sheet = Image.new("RGB", (columns * VIEW, len(DIFFICULTIES) * VIEW))
    for row, difficulty in enumerate(DIFFICULTIES):
        for column in range(columns):
            sheet.paste(make_scene(first_seed + column, difficulty).image(), (column * VIEW, row * VIEW))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of panel scenes.")
    parser.add_argument("out", help="picture to write, e.g. sheet.png")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=6)
    args = parser.parse_args()
    contact_sheet(args.first_seed, args.columns).save(args.out)


if __name__ == "__main__":
    main()
