"""The runtime beside its peers: same files, same machine, same threads, in alternating turns.

    python tests/bench_runtime.py llama-bench=PATH mtmd=PATH llama.cpp=SOURCES [kept=build/bench] [--parts decode,tiles]

`llama-bench` and `mtmd` are llama.cpp's own programs; docs/benchmarks.md says how to build them. SOURCES is llama.cpp's
source tree, for the vocabulary of a Llama of random weights. Models are made once and kept in `kept`. Every turn is a
process of its own, with warm page cache. The parts:

decode: prefill and decode beside llama-bench and `Llama.create_chat_completion`.
second: the second question about a picture, and a picture that another process has seen.
tiles: a 12 MP JPEG to the first token beside llama-mtmd-cli, process start included.
start: `edgevlm ask` with the built-in model, process start to exit.

Prints a card, tables in Markdown, which goals are reached, and as the last line the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_models
from bench_convert import Run, measure

from edgevlm.bench import Spread, card, encode_jpeg, synthetic_photo
from edgevlm.machine import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
PANEL = ROOT / "examples" / "panel.jpg"
PARTS = ("decode", "second", "tiles", "start")
#: Positions of prefill and tokens of decode; llama-bench's own defaults.
N_PROMPT, N_GEN = 512, 128
#: Both programs of the tiles get this context, edgevlm's default; llama-mtmd-cli's would be the model's 8,192.
CONTEXT = 4096
#: Tiles -> (height, width) of the 12 MP picture; a single tile is another bundle's (`bench_models.smolvlm`).
PICTURES = {1: (3000, 4000), 5: (1732, 6928), 17: (3464, 3464)}
QUESTION, OTHER_QUESTION = "What does the display read?", "Which lamps are on?"


@dataclass(frozen=True)
class Goal:
    """`found` must be at most `limit`, or at least if `least`."""

    what: str
    found: float
    limit: float
    least: bool = False

    @property
    def reached(self) -> bool:
        return self.found >= self.limit if self.least else self.found <= self.limit


@dataclass(frozen=True)
class Setting:
    """What every part is given. `binaries` are llama.cpp's programs and sources by their names on the command line."""

    threads: int
    rounds: int
    kept: Path
    binaries: Mapping[str, Path]
    shape: str
    encoder: str

    def path(self, name: str) -> Path:
        if name not in self.binaries or not self.binaries[name].exists():
            raise SystemExit(f"{name}=PATH is needed for this; docs/benchmarks.md says how to get it")
        return self.binaries[name]


Values = dict[str, list[float]]
#: What a part found: what it printed as tables, its goals, all values.
Part = tuple[str, list[Goal], dict[str, Any]]


def spread(values: list[float]) -> Spread:
    return Spread.of(values) if len(values) > 1 else Spread(values[0], values[0], 0.0)


def median_spread(values: list[float], digits: int) -> str:
    found = spread(values)
    return f"{found.median:.{digits}f} ± {found.quartile_range / 2:.{digits}f}" if values else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- prefill and decode


def ours_decode(model: str, threads: int) -> dict[str, float]:
    """Tokens per second of our own loop; decode begins with an empty context, as llama-bench's does."""
    import numpy as np

    from edgevlm.decoder import Decoder
    from edgevlm.generate import Generation
    from edgevlm.options import GenerateOptions
    from edgevlm.splice import ImageSegment, Segment, TextSegment

    decoder = Decoder(model, threads=threads)
    random = np.random.default_rng(0)
    text = TextSegment(tuple(random.integers(0, decoder.n_vocab, N_PROMPT).tolist()))
    rows = ImageSegment(0.02 * random.standard_normal((N_PROMPT, decoder.n_embd), dtype=np.float32))
    _never_end(decoder.vocabulary)

    def prefill(segment: Segment) -> float:
        decoder.reset()
        started = time.perf_counter()
        decoder.prefill([segment])
        return N_PROMPT / (time.perf_counter() - started)

    def decode(n_tokens: int) -> float:
        decoder.reset()
        decoder.prefill([TextSegment((1,))])
        generation = Generation(decoder, GenerateOptions(max_tokens=n_tokens))
        for _ in generation:
            pass
        seconds = time.perf_counter() - generation.first_token_at
        assert len(generation.tokens) == n_tokens, len(generation.tokens)
        return (n_tokens - 1) / seconds

    prefill(text)
    decode(4)
    return {"text": prefill(text), "rows": prefill(rows), "decode": decode(N_GEN)}


def _never_end(vocabulary: Any) -> None:
    """Go on after an end token, at the cost of asking about it."""
    is_end = vocabulary.is_end
    vocabulary.is_end = lambda token: is_end(token) and False


def stock_decode(model: str, threads: int) -> dict[str, float]:
    """Tokens per second of llama-cpp-python's API; the times are taken where it draws a token."""
    import llama_cpp
    import llama_cpp.llama

    llama_cpp.llama.llama_cpp.llama_vocab_is_eog = lambda vocab, token: False
    llm = llama_cpp.Llama(model, n_ctx=1024, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
    sample, drawn = llm.sample, []

    def timed(*arguments: Any, **options: Any) -> int:
        token = sample(*arguments, **options)
        drawn.append(time.perf_counter())
        return token

    llm.sample = timed

    def complete(question: str, n_tokens: int) -> float:
        drawn.clear()
        llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=n_tokens, temperature=0)
        assert len(drawn) >= n_tokens, len(drawn)  # it draws a few more where a text ends inside a character
        return (len(drawn) - 1) / (drawn[-1] - drawn[0])

    complete(OTHER_QUESTION, 4)
    return {"decode": complete(QUESTION, N_GEN)}


def llama_bench(program: Path, model: str, threads: int) -> dict[str, float]:
    command = [str(program), "-m", model, "-p", str(N_PROMPT), "-n", str(N_GEN), "-t", str(threads), "-fa", "1",
               "-r", "1", "-o", "json"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    rates = {run["n_prompt"]: run["avg_ts"] for run in json.loads(result.stdout)}
    return {"text": rates[N_PROMPT], "decode": rates[0]}


def decode_part(setting: Setting) -> Part:
    models = {
        "SmolLM2-135M Q4_1": bench_models.smollm2(),
        f"Llama-{setting.shape} q4_k_m, random": bench_models.llama(
            setting.kept, setting.shape, setting.path("llama.cpp")
        ),
    }
    texts, goals, results = [], [], {}
    threads = setting.threads
    for name, path in models.items():
        model = str(path)
        turns: dict[str, Callable[[], dict[str, float]]] = {
            "edgevlm": lambda model=model: child("ours_decode", model, threads),
            "llama-bench": lambda model=model: llama_bench(setting.path("llama-bench"), model, threads),
            "create_chat_completion": lambda model=model: child("stock_decode", model, threads),
        }
        found: dict[str, Values] = {contender: {} for contender in turns}
        for turn in range(setting.rounds):
            for contender, run in turns.items():
                rates = run()
                say(f"  {name}, turn {turn + 1}, {contender}: {rates}")
                for what, rate in rates.items():
                    found[contender].setdefault(what, []).append(rate)
        results[name] = found
        columns = {"prefill": "text", "prefill of embeddings": "rows", "decode": "decode"}
        rows = []
        for contender, rates in found.items():
            cells = [median_spread(rates[what], 1) if what in rates else "" for what in columns.values()]
            rows.append([contender, *cells, f"{max(rates['decode']):.1f}"])
        texts.append(table([f"{name}, tokens/s", *columns, "best decode"], rows))
        for contender, limit in (("llama-bench", 0.97), ("create_chat_completion", 1.25)):
            ratio = statistics.median(found["edgevlm"]["decode"]) / statistics.median(found[contender]["decode"])
            goals.append(Goal(f"{name}: decode / {contender}'s", ratio, limit, least=True))
    return "\n\n".join(texts), goals, results


# ---- the second question


def ask_twice(model: str | None, picture: str, other: str, threads: int) -> dict[str, float]:
    """Times to the first token of two questions about one picture, after one about another picture."""
    import edgevlm

    with edgevlm.load(model, threads=threads) as loaded:
        loaded.ask(QUESTION, [other], max_tokens=8)
        first, second = (loaded.ask(text, [picture], max_tokens=8) for text in (QUESTION, OTHER_QUESTION))
    return {"first": first.timings.first_token_s, "second": second.timings.first_token_s,
            "cached": second.usage.cached_tokens, "prompt": second.usage.prompt_tokens}  # fmt: skip


def ask_once(model: str | None, picture: str, question: str, state: str, threads: int) -> dict[str, float]:
    """One question by a process that keeps what it computes in a folder."""
    import edgevlm

    with edgevlm.load(model, threads=threads, state=state) as loaded:
        timings = loaded.ask(question, [picture], max_tokens=8).timings
    return {"first_token": timings.first_token_s, "encode": timings.encode_s, "load": timings.load_s}


def second_part(setting: Setting) -> Part:
    goals, rows, results = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        photo, small = Path(folder) / "photo.jpg", Path(folder) / "small.jpg"
        photo.write_bytes(encode_jpeg(synthetic_photo(3000, 4000)))
        small.write_bytes(encode_jpeg(synthetic_photo(480, 640)))
        bundle = str(bench_models.smolvlm(setting.kept, setting.encoder) / "bundle")
        models = {"built-in, panel.jpg": (None, PANEL), "SmolVLM-256M's sizes, 12 MP": (bundle, photo)}
        found: dict[str, Values] = {name: {} for name in models}
        for turn in range(setting.rounds):
            for name, (model, picture) in models.items():
                state = str(Path(folder) / f"state-{turn}")
                taken = child("ask_twice", model, str(picture), str(small), setting.threads)
                child("ask_once", model, str(picture), QUESTION, state, setting.threads)
                again = child("ask_once", model, str(picture), OTHER_QUESTION, state, setting.threads)
                taken |= {f"new_{what}": value for what, value in again.items()}
                say(f"  {name}, turn {turn + 1}: {taken}")
                for what, value in taken.items():
                    found[name].setdefault(what, []).append(value)
    for name, values in found.items():
        ratio = statistics.median(values["second"]) / statistics.median(values["first"])
        times = [median_spread(values[what], 3) for what in ("first", "second", "new_first_token")]
        encode = max(values["new_encode"])
        rows.append([name, *times, f"{100 * ratio:.1f} %", f"{encode:.3f}"])
        goals += [Goal(f"{name}: second / first question", ratio, 0.1), Goal(f"{name}: new process, encode", encode, 0)]
        results[name] = values
    head = ["to the first token, s", "first question", "second", "new process, `state=`", "second / first", "encode"]
    return table(head, rows), goals, results


# ---- a large picture, from the start of a process


def tile_commands(setting: Setting, models: Path, n_tiles: int, photo: Path) -> dict[str, list[str]]:
    """What each contender is called with."""
    bundle, projector = ("single", "single") if n_tiles == 1 else ("bundle", "mmproj")
    threads = str(setting.threads)
    commands = {
        "edgevlm": [sys.executable, "-m", "edgevlm", "ask", QUESTION, "-i", str(photo), "-m", str(models / bundle),
                    "--max-tokens", "1", "--threads", threads, "--context", str(CONTEXT)]
    }  # fmt: skip
    for kind in ("f16", "q8_0"):
        commands[f"mtmd, {kind}"] = [
            str(setting.path("mtmd")), "-m", str(models / bundle / "decoder.gguf"),
            "--mmproj", str(models / f"{projector}-{kind}.gguf"), "--image", str(photo), "-p", QUESTION,
            "-n", "1", "-t", threads, "--temp", "0", "-c", str(CONTEXT), "-fa", "on", "--no-warmup", "--jinja",
        ]  # fmt: skip
    return commands


def tiles_part(setting: Setting) -> Part:
    models = bench_models.smolvlm(setting.kept, setting.encoder)
    found: dict[int, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for n_tiles, (height, width) in PICTURES.items():
            photo = Path(folder) / f"{n_tiles}.jpg"
            photo.write_bytes(encode_jpeg(synthetic_photo(height, width)))
            commands[n_tiles] = tile_commands(setting, models, n_tiles, photo)
            found[n_tiles] = {name: [] for name in commands[n_tiles]}
        for turn in range(setting.rounds):
            for n_tiles, contenders in commands.items():
                for name, command in contenders.items():
                    run = measure(command)
                    assert run.first_s is not None, f"{name} printed nothing"
                    found[n_tiles][name].append(run)
                    say(f"  {n_tiles} tiles, turn {turn + 1}, {name}: {run}")
    texts, goals = [], []
    for n_tiles, runs in found.items():
        head = [f"{n_tiles} tiles", "first token, s", "exit, s", "peak, MB", "own memory", "mapped files"]
        texts.append(table(head, [[name, *_figures(taken)] for name, taken in runs.items()]))
        ours, *theirs = ([statistics.median(run.first_s or 0 for run in taken), max(run.peak for run in taken)]
                         for taken in runs.values())  # fmt: skip
        best_s, best_bytes = (min(column) for column in zip(*theirs, strict=True))
        goals += [
            Goal(f"{n_tiles} tiles: time to the first token / mtmd's best", ours[0] / best_s, 1 / 3),
            Goal(f"{n_tiles} tiles: peak memory / mtmd's best", ours[1] / best_bytes, 0.7),
        ]
    return "\n\n".join(texts), goals, {
        str(n): {name: [asdict(run) for run in taken] for name, taken in runs.items()} for n, runs in found.items()
    }  # fmt: skip


def _figures(runs: list[Run]) -> list[str]:
    peaks = (max(getattr(run, what) for run in runs) / 1e6 for what in ("peak", "own", "mapped"))
    return [median_spread([run.first_s or 0 for run in runs], 2), median_spread([run.seconds for run in runs], 2),
            *(f"{peak:.0f}" for peak in peaks)]  # fmt: skip


# ---- start to exit


def start_part(setting: Setting) -> Part:
    command = [sys.executable, "-m", "edgevlm", "ask", QUESTION, "-i", str(PANEL), "--threads", str(setting.threads)]
    turns = {"edgevlm ask, built-in model": command, "python -c pass": [sys.executable, "-c", "pass"]}
    found: dict[str, list[Run]] = {name: [] for name in turns}
    for _ in range(10):
        for name, each in turns.items():
            found[name].append(measure(each))
    rows = [
        [name, f"{min(run.seconds for run in runs):.3f}", median_spread([run.seconds for run in runs], 3),
         f"{statistics.median(run.cpu_s for run in runs):.3f}", f"{max(run.peak for run in runs) / 1e6:.0f}"]
        for name, runs in found.items()
    ]  # fmt: skip
    median = statistics.median(run.seconds for run in found["edgevlm ask, built-in model"])
    head = ["start to exit, s", "best of 10", "median", "of processors", "peak, MB"]
    results = {name: [asdict(run) for run in runs] for name, runs in found.items()}
    return table(head, rows), [Goal("edgevlm ask, built-in model: start to exit, s", median, 1.0)], results


# ---- the run


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    function.__name__: function for function in (ours_decode, stock_decode, ask_twice, ask_once)
}


def child(name: str, *arguments: Any) -> dict[str, float]:
    """What one of `CHILDREN` returns in a fresh process."""
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name}{arguments} failed:\n{result.stderr[-2000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def goals_table(goals: Iterable[Goal]) -> str:
    rows = [[goal.what, f"{'>=' if goal.least else '<='} {goal.limit:.3g}", f"{goal.found:.3g}",
             "pass" if goal.reached else "miss"] for goal in goals]  # fmt: skip
    return table(["goal", "wanted", "found", ""], rows)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="NAME=PATH", help="llama-bench, mtmd, llama.cpp, kept")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--shape", default="1b", help="of bench_convert.SHAPES")
    parser.add_argument("--encoder", default="int8")
    options = parser.parse_args()
    paths = {name: Path(path).absolute() for name, path in (given.split("=", 1) for given in options.paths)}
    kept = paths.pop("kept", ROOT / "build" / "bench")
    setting = Setting(options.threads, options.rounds, kept, paths, options.shape, options.encoder)
    run = {"decode": decode_part, "second": second_part, "tiles": tiles_part, "start": start_part}
    about = card("onnxruntime", "llama-cpp-python", "numpy") | {"threads": options.threads, "rounds": options.rounds}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled already
    goals, results = [], {}
    for part in options.parts.split(","):
        load = os.getloadavg()[0]
        text, reached, results[part] = run[part](setting)
        goals += reached
        print(f"\n## {part} (load before it: {load:.1f})\n\n{text}", flush=True)
    print(f"\n{goals_table(goals)}\n")
    print(json.dumps({"card": about, "results": results,
                      "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals]}))  # fmt: skip


if __name__ == "__main__":
    main()
