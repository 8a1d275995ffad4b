"""Questions about a panel, each with one canonical answer that follows from the panel's truth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from panel.truth import LAMP_COLOURS, PanelTruth

# Wordings per kind of question; the first is the canonical one. `{colour}` is a lamp's colour.
WORDINGS: dict[str, tuple[str, ...]] = {
    "display": (
        "What does the display read?",
        "What does the display show?",
        "What is on the display?",
        "What does the display say?",
        "Read the display.",
        "What number is on the display?",
        "And the display?",
    ),
    "gauge": (
        "What does the gauge show?",
        "What does the gauge read?",
        "What is the value of the gauge?",
        "Read the gauge.",
        "Where is the needle of the gauge?",
        "And the gauge?",
    ),
    "lamps_on": (
        "Which lamps are on?",
        "Which lamps are lit?",
        "What lamps are on?",
        "Name the lamps that are on.",
        "And the lamps?",
    ),
    "lamp_state": (
        "Is the {colour} lamp on?",
        "Is the {colour} lamp lit?",
        "Is the {colour} light on?",
        "And the {colour} lamp?",
    ),
    "lamp_count": (
        "How many lamps are there?",
        "How many lamps does the panel have?",
        "How many lamps do you see?",
        "Count the lamps.",
    ),
    "lit_count": (
        "How many lamps are on?",
        "How many lamps are lit?",
        "Count the lamps that are on.",
    ),
    "describe": (
        "Describe the panel.",
        "Describe the picture.",
        "Describe the image.",
        "Describe it.",
        "What is in the picture?",
        "What do you see?",
        "What does the panel show?",
    ),
}
KINDS = tuple(WORDINGS)
CARELESS_SHARE = 0.1
NO_PICTURE_ANSWER = "I see no picture."


@dataclass(frozen=True)
class Question:
    """A question of one kind about one panel, with its only right answer."""

    kind: str
    text: str
    answer: str


def join_colours(colours: list[str]) -> str:
    """["red", "green", "blue"] -> "red, green and blue"; no colours -> "none"."""
    if len(colours) < 2:
        return colours[0] if colours else "none"
    return f"{', '.join(colours[:-1])} and {colours[-1]}"


def _lamp_state(truth: PanelTruth, colour: str) -> str:
    lamp = truth.lamp(colour)
    if lamp is None:
        return f"there is no {colour} lamp"
    return "yes" if lamp.lit else "no"


def _describe(truth: PanelTruth) -> str:
    lit = truth.lit_colours()
    if not lit:
        lamps = "no lamp is on"
    elif len(lit) == 1:
        lamps = f"the {lit[0]} lamp is on"
    else:
        lamps = f"the {join_colours(lit)} lamps are on"
    return f"The display reads {truth.display}, the gauge shows {truth.gauge}, and {lamps}."


def answer(truth: PanelTruth, kind: str, colour: str | None = None) -> str:
    """The canonical answer to a kind of question; `colour` is needed for "lamp_state" only."""
    match kind:
        case "display":
            return truth.display
        case "gauge":
            return str(truth.gauge)
        case "lamps_on":
            return join_colours(truth.lit_colours())
        case "lamp_state" if colour in LAMP_COLOURS:
            return _lamp_state(truth, colour)
        case "lamp_count":
            return str(len(truth.lamps))
        case "lit_count":
            return str(len(truth.lit_colours()))
        case "describe":
            return _describe(truth)
    raise ValueError(f"no question of kind {kind!r} about colour {colour!r}; kinds are {', '.join(KINDS)}")


def sample_question(truth: PanelTruth, kind: str, rng: random.Random) -> Question:
    """A question of this kind in a random wording, about a random colour where one is needed.

    A few are typed carelessly, in lower case and without the mark at the end.
    """
    colour = rng.choice(LAMP_COLOURS)
    text = rng.choice(WORDINGS[kind]).format(colour=colour)
    if rng.random() < CARELESS_SHARE:
        text = text.lower().rstrip("?.")
    return Question(kind, text, answer(truth, kind, colour))


def all_questions(truth: PanelTruth) -> list[Question]:
    """Every wording of every kind, and of every colour where one is named."""
    questions = []
    for kind, wordings in WORDINGS.items():
        for wording in wordings:
            colours = LAMP_COLOURS if "{colour}" in wording else (None,)
            questions += [Question(kind, wording.format(colour=c), answer(truth, kind, c)) for c in colours]
    return questions
