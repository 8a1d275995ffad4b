"""What a panel shows, apart from how it looks: the ground truth that answers are derived from."""

from __future__ import annotations

import random
from dataclasses import dataclass

LAMP_COLOURS = ("red", "green", "yellow", "blue")
"""Every colour a lamp can have, in the canonical order in which answers list them."""

MAX_DIGITS = 4
GAUGE_MAX = 100


@dataclass(frozen=True)
class Lamp:
    """One indicator lamp; `colour` is one of `LAMP_COLOURS`."""

    colour: str
    lit: bool


@dataclass(frozen=True)
class PanelTruth:
    """The facts of one panel.

    `display` is the text of the seven-segment display ("7", "12.5"); `gauge` the needle's value in whole
    units, 0 to 100; `lamps` are in the order in which they are mounted, with distinct colours.
    """

    display: str
    gauge: int
    lamps: tuple[Lamp, ...]

    def lamp(self, colour: str) -> Lamp | None:
        """The lamp of this colour, or None if the panel has none."""
        return next((lamp for lamp in self.lamps if lamp.colour == colour), None)

    def lit_colours(self) -> list[str]:
        """Colours of the lit lamps in canonical order."""
        return [colour for colour in LAMP_COLOURS if (lamp := self.lamp(colour)) is not None and lamp.lit]


def sample_display(rng: random.Random) -> str:
    """Draw the text of a display: 1 to 4 digits, half of the longer ones with a decimal point."""
    count = rng.randint(1, MAX_DIGITS)
    digits = [rng.choice("0123456789") for _ in range(count)]
    point = rng.randint(1, count - 1) if count > 1 and rng.random() < 0.5 else None
    # Instruments blank leading zeros, except the one before a decimal point.
    if count > 1 and point != 1 and digits[0] == "0":
        digits[0] = rng.choice("123456789")
    if point is None:
        return "".join(digits)
    return "".join(digits[:point]) + "." + "".join(digits[point:])


def sample_truth(rng: random.Random) -> PanelTruth:
    """Draw the facts of a panel; every digit, gauge value and set of lamps is about equally likely."""
    colours = rng.sample(LAMP_COLOURS, rng.randint(1, len(LAMP_COLOURS)))
    return PanelTruth(
        display=sample_display(rng),
        gauge=rng.randint(0, GAUGE_MAX),
        lamps=tuple(Lamp(colour, rng.random() < 0.5) for colour in colours),
    )
