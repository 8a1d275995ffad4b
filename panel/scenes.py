"""Scenes: a panel with known truth, photographed. ``python -m panel.scenes sheet.png`` draws a contact sheet."""

from __future__ import annotations

import argparse
import io
import random
from dataclasses import dataclass

from PIL import Image

from panel.camera import DIFFICULTIES, MIXED, VIEW, photograph
from panel.drawing import draw_panel, sample_style
from panel.truth import PanelTruth, sample_truth


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


def make_scene(seed: int, difficulty: str = MIXED) -> Scene:
    """Make the scene of a seed. Truth and looks depend on the seed alone, the shot on the difficulty too."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty {difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
    rng = random.Random(seed)
    truth = sample_truth(rng)
    front = draw_panel(truth, sample_style(rng, truth), rng)
    return Scene(seed, difficulty, truth, photograph(front, seed, difficulty))


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
