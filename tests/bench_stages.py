"""Times every stage of an answer of the built-in model on this machine: `make bench`.

Prints a card, a table of medians with the spread, and as the last line the same as JSON. A single run on a busy machine
says little: compare ratios inside one run.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import edgevlm
from edgevlm.machine import peak_rss_bytes, usable_cpus

PICTURE = Path(__file__).parent.parent / "examples" / "panel.jpg"
QUESTION = "Describe the panel."
WARM_UP, RUNS = 3, 30
#: Above this spread of the whole answer the table is marked as noisy.
NOISY = 0.10


def card() -> dict[str, str | int]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "llama-cpp-python", "numpy")}
    return {"edgevlm": edgevlm.__version__, "cpu": cpu, "threads": usable_cpus(), **versions}


def main() -> None:
    about = card()
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
        values = sorted(getattr(answer.timings, stage) for answer in answers)
        low, high = values[len(values) // 4], values[-len(values) // 4]
        rows[stage] = {"median": statistics.median(values), "best": values[0], "quartile_range": high - low}
    rows["load_s"]["median"] = rows["load_s"]["best"] = load_s
    print("| stage | median | best | quartile range |\n|---|---|---|---|")
    for stage, row in rows.items():
        unit, scale = ("/s", 1.0) if stage == "tokens_per_s" else ("ms", 1e3)
        print(f"| {stage} | " + " | ".join(f"{value * scale:.2f} {unit}" for value in row.values()) + " |")
    spread = rows["generate_s"]["quartile_range"] / rows["generate_s"]["median"]
    if spread > NOISY:
        print(f"WARNING: the machine was busy; generate_s varied by {spread:.0%} between the quartiles")
    print(json.dumps({"card": about, "stages": rows, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
