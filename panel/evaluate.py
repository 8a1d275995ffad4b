"""Measures how often greedy answers are right, on panels that were never trained on.

    python -m panel.evaluate --reference panel/checkpoint     transformers, float32
    python -m panel.evaluate --bundle FOLDER                  a bundle, through edgevlm's public interface
    python -m panel.evaluate                                  the built-in bundle
    python -m panel.evaluate --against OTHER                  how many answers differ between two bundles
    python -m panel.evaluate --image-tokens full 36 36:pool   what budgets of image tokens cost and gain

Prints a Markdown table, and last one line of JSON with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from panel.camera import DIFFICULTIES
from panel.questions import KINDS, Question, sample_question
from panel.scenes import make_scene

FIRST_SEED = 900_000_000  # training starts at panel.dataset.TRAIN_FIRST_SEED, a hundred million further
GAUGE_TOLERANCE = 3
MAX_TOKENS = 64
# Columns of the table: the kinds, and the gauge once more with its tolerance.
METRICS = ("display", "gauge", "gauge ±3", *KINDS[2:], "describe ±3")

Answerer = Callable[[list[Image.Image], list[str]], list[str]]
"""Answers the n-th question about the n-th picture."""


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    seed: int
    difficulty: str
    image: Image.Image
    question: Question


def make_items(panels: int, first_seed: int) -> list[Item]:
    """One question of every kind, in a random wording, about each panel; difficulties take turns."""
    items = []
    for seed in range(first_seed, first_seed + panels):
        scene = make_scene(seed, DIFFICULTIES[seed % len(DIFFICULTIES)])
        image, rng = scene.image(), random.Random(seed)
        items += [Item(seed, scene.difficulty, image, sample_question(scene.truth, kind, rng)) for kind in KINDS]
    return items


def _gauge_in(text: str) -> tuple[str, int | None]:
    """The text with its gauge value replaced by "#", and that value."""
    match = re.search(r"(?<=the gauge shows )\d{1,3}(?=,)|^\d{1,3}$", text)
    if match is None:
        return text, None
    return text[: match.start()] + "#" + text[match.end() :], int(match.group())


def score(question: Question, given: str) -> dict[str, bool]:
    """Which metrics this answer counts for, and whether it is right: exact match, or with the gauge's tolerance."""
    scores = {question.kind: given == question.answer}
    if question.kind in ("gauge", "describe"):
        (right_text, right), (given_text, value) = _gauge_in(question.answer), _gauge_in(given)
        near = right is not None and value is not None and abs(value - right) <= GAUGE_TOLERANCE
        scores[f"{question.kind} ±{GAUGE_TOLERANCE}"] = near and right_text == given_text
    return scores


def reference_answerer(checkpoint: Path) -> Answerer:
    """The checkpoint in transformers, float32, greedy."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def answer(images: list[Image.Image], questions: list[str]) -> list[str]:
        contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        chats = [[{"role": "user", "content": content}] for content in contents]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        # The template has printed the beginning-of-text token already.
        inputs = processor(
            text=prompts,
            images=images,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        with torch.inference_mode():
            ids_BT = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return processor.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def bundle_answerer(bundle: Path | None) -> Answerer:
    """A bundle, or the built-in one, through the public interface."""
    import edgevlm

    model = edgevlm.load() if bundle is None else edgevlm.load(bundle)

    def answer(images: list[Image.Image], questions: list[str]) -> list[str]:
        pairs = zip(images, questions, strict=True)
        return [model.ask(question, images=[image], max_tokens=MAX_TOKENS).text for image, question in pairs]

    return answer


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    # Answers of one kind are about equally long: a batch of one kind wastes few steps.
    ordered = sorted(items, key=lambda item: KINDS.index(item.question.kind))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def evaluate(answerer: Answerer, items: list[Item], batch: int, errors: list[str]) -> dict[str, dict[str, float]]:
    """Share of right answers per metric, for each difficulty and for all; wrong answers are noted in `errors`."""
    results: dict[str, dict[str, list[bool]]] = {}
    for group in _batches(items, batch):
        answers = answerer([item.image for item in group], [item.question.text for item in group])
        for item, given in zip(group, answers, strict=True):
            for metric, right in score(item.question, given).items():
                for row in (item.difficulty, "all"):
                    results.setdefault(row, {}).setdefault(metric, []).append(right)
            if given != item.question.answer:
                asked = f"{item.question.text} {given!r}, not {item.question.answer!r}"
                errors.append(f"{item.difficulty} {item.seed}: {asked}")
    rows = (*DIFFICULTIES, "all")
    return {
        row: {metric: sum(results[row][metric]) / len(results[row][metric]) for metric in METRICS}
        for row in rows
        if row in results
    }


def changed(one: Answerer, other: Answerer, items: list[Item]) -> dict[str, float]:
    """Share of the panels to which two models give different answers, for each kind of question.

    `gauge ±3` counts only readings that differ by more than the tolerance: the needle is often between two values.
    """
    found: dict[str, list[bool]] = {}
    for group in _batches(items, 1):
        (item,) = group
        first, second = (answerer([item.image], [item.question.text])[0] for answerer in (one, other))
        found.setdefault(item.question.kind, []).append(first != second)
        if item.question.kind == "gauge":
            (_, a), (_, b) = _gauge_in(first), _gauge_in(second)
            near = a is not None and b is not None and abs(a - b) <= GAUGE_TOLERANCE
            found.setdefault(f"gauge ±{GAUGE_TOLERANCE}", []).append(not near)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def markdown(accuracy: dict[str, dict[str, float]]) -> str:
    """The table, in percent."""
    lines = [
        "| difficulty | " + " | ".join(metric.replace("_", " ") for metric in METRICS) + " |",
        "|---|" + "---:|" * len(METRICS),
    ]
    for row, shares in accuracy.items():
        lines.append(f"| {row} | " + " | ".join(f"{100 * shares[metric]:.1f}" for metric in METRICS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the built-in model.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--reference", type=Path, metavar="CHECKPOINT", help="run a checkpoint in transformers")
    which.add_argument("--bundle", type=Path, help="run a bundle (default: the built-in one)")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="count the answers that differ from this one's")
    parser.add_argument("--image-tokens", nargs="+", metavar="full|N|N:pool", help="compare budgets of a bundle")
    parser.add_argument("--panels", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--batch", type=int, default=50, help="questions per batch of the reference")
    parser.add_argument("--errors", type=Path, help="write the wrong answers to this file")
    args = parser.parse_args()

    if args.image_tokens:
        from panel import budgets

        rows = budgets.compare(args.bundle, args.image_tokens, make_items(args.panels, args.first_seed), METRICS)
        print(budgets.markdown(rows, METRICS))
        print(json.dumps({"panels": args.panels, "budgets": rows}))
        return
    answerer = reference_answerer(args.reference) if args.reference else bundle_answerer(args.bundle)
    items = make_items(args.panels, args.first_seed)
    if args.against:
        shares = changed(answerer, bundle_answerer(args.against), items)
        print(json.dumps({"panels": args.panels, "changed": shares}))
        return
    errors: list[str] = []
    started = time.monotonic()
    accuracy = evaluate(answerer, items, args.batch, errors)
    seconds = time.monotonic() - started
    if args.errors:
        args.errors.write_text("".join(error + "\n" for error in errors))
    model = "reference" if args.reference else "bundle"
    print(markdown(accuracy))
    print(json.dumps({"model": model, "panels": args.panels, "seconds": round(seconds, 1), "accuracy": accuracy}))


if __name__ == "__main__":
    main()
