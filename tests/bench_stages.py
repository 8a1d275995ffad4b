"""Times every stage of an answer of the built-in model on this machine: `make bench`.

Prints a card, a table of medians with the spread, and as the last line the same as JSON. A single run on a busy machine
says little: compare ratios inside one run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import edgevlm
from edgevlm.bench import Spread, card
from edgevlm.machine import peak_rss_bytes

PICTURE = Path(__file__).parent.parent / "examples" / "panel.jpg"
QUESTION = "Describe the panel."
WARM_UP, RUNS = 3, 30
#: Above this spread of the whole answer the table is marked as noisy.
NOISY = 0.10


def main() -> None:
    about = card("onnxruntime", "llama-cpp-python", "numpy")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    started = time.perf_counter()
    with edgevlm.load() as model:
        load_s = time.perf_counter() - started
        answers = [model.ask(QUESTION, images=[PICTURE]) for _ in range(WARM_UP + RUNS)][WARM_UP:]
    usage = answers[0].usage
    print(f"{QUESTION!r}: {usage.prompt_tokens} prompt tokens ({usage.image_tokens} of the picture), "
          f"{usage.completion_tokens} answer tokens, {RUNS} runs")  # fmt: skip
    rows: dict[str, dict[str, float]] = {}
    for stage in asdict(answers[0].timings):
        rows[stage] = asdict(Spread.of([getattr(answer.timings, stage) for answer in answers]))
    rows["load_s"]["median"] = rows["load_s"]["best"] = load_s
    print("| stage | best | median | quartile range |\n|---|---|---|---|")
    for stage, row in rows.items():
        unit, scale = ("/s", 1.0) if stage == "tokens_per_s" else ("ms", 1e3)
        print(f"| {stage} | " + " | ".join(f"{value * scale:.2f} {unit}" for value in row.values()) + " |")
    spread = rows["generate_s"]["quartile_range"] / rows["generate_s"]["median"]
    if spread > NOISY:
        print(f"WARNING: the machine was busy; generate_s varied by {spread:.0%} between the quartiles")
    print(json.dumps({"card": about, "stages": rows, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
