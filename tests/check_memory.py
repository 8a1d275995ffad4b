"""The estimate of memory beside the measured peak, for models of real sizes: by hand, not in CI.

    python tests/check_memory.py [llama.cpp=SOURCES] [folder=DIR] [only=NAME;...]

Each case runs in a fresh process, which fills the context, so that the whole cache and a whole batch are used, and
looks at two different pictures. Measured are VmHWM and, every few milliseconds, RssAnon and RssFile. SOURCES is
llama.cpp's source tree (see bench_convert.py): with it, a model of Llama 3.2 1B's shape is made and measured as well.
Prints the table of docs/memory.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, threading, time
import numpy as np
import edgevlm
from edgevlm.machine import peak_rss_bytes, resident_bytes
from edgevlm.splice import TextSegment

case = json.loads(sys.argv[1])
seen, done = [0, 0], threading.Event()
def watch():
    while not done.wait(0.003):
        seen[:] = [max(pair) for pair in zip(seen, resident_bytes())]
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
with edgevlm.load(case["model"], context=case["context"], ram_budget=case["budget"], threads=1) as model:
    height, width = case["picture_px"]
    random = np.random.default_rng(1)
    for turn in range(2 if height else 0):
        picture = np.full((height, width, 4), 40 * turn, np.uint8)  # four bytes, as Pillow leaves them
        picture[::7, ::5] = random.integers(0, 256, 4)
        # the cache of embeddings is no part of the estimate
        model._vision._embeds.limit_bytes = 0
        model.ask("What is this?", [picture[:, :, :3]], max_tokens=1)
        del picture
    decoder = model._decoder
    decoder.reset()
    while decoder.n_past < decoder.n_context:
        count = min(512, decoder.n_context - decoder.n_past)
        decoder.prefill([TextSegment((5, 6, 7, 8) * (count // 4))])
    plan = model.memory
done.set()
watcher.join()
print(json.dumps({"peak": peak_rss_bytes(), "own": seen[0], "mapped": seen[1], "plan": plan.to_json()}))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row; a picture of 0 x 0 pixels is none."""

    name: str
    model: str | None
    context: int | None = None
    budget: str | None = None
    picture_px: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Result:
    """Bytes: measured, and estimated for pictures of this size."""

    peak: int
    own: int
    mapped: int
    estimate: int
    estimate_own: int
    plan: dict[str, Any]

    @property
    def error(self) -> float:
        return self.estimate / self.peak - 1


def measure(case: Case) -> Result:
    """Run a case in a process of its own."""
    words = json.dumps({**vars(case), "picture_px": list(case.picture_px)})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, words], capture_output=True, text=True, timeout=900, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    estimate, own = estimated(found["plan"], case.picture_px)
    return Result(found["peak"], found["own"], found["mapped"], estimate, own, found["plan"])


def estimated(plan: dict[str, Any], picture_px: tuple[int, int]) -> tuple[int, int]:
    """(peak, its own memory) of a plan, with a picture of this size instead of the plan's."""
    parts = plan["parts"]
    assumed = parts.get("picture", {"own": 0})["own"]
    # numpy's four bytes for each pixel, as a decoded JPEG takes
    change = 4 * picture_px[0] * picture_px[1] - assumed
    return plan["peak"]["total"] + change, plan["peak"]["own"] + change


def smolvlm(folder: Path) -> Path:
    """A bundle of SmolVLM-256M's shape: SmolLM2-135M, and a random SigLIP-B/16 at 512 pixels as int8."""
    import bench_encoder as bench

    from edgevlm import bundle as bundles
    from edgevlm.gguf import read_header
    from edgevlm.spec import DecoderSpec, ImageSpec, ModelSpec, PromptSpec

    folder.mkdir(parents=True)
    tower = bench.TOWERS["siglip-b16-512"]
    weights, connector = bench.random_weights(tower)
    bench.build_encoder(
        folder / "encoder.onnx", bench.resolved(tower), weights.__getitem__, connector.__getitem__, "int8"
    )
    shutil.copy(bench.smollm2(), folder / "decoder.gguf")
    header = read_header(folder / "decoder.gguf")
    image = ImageSpec(policy="tiles", height_px=512, width_px=512, longest_px=2048, resample="lanczos",
                      rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)  # fmt: skip
    decoder = DecoderSpec(arch="llama", layers=30, n_embd=576, vocab=len(header.metadata["tokenizer.ggml.tokens"]),
                          context_length=header.context_length)  # fmt: skip
    spec = ModelSpec(name="smolvlm-256m-shaped", family="smolvlm", image=image, encoder=tower.spec, decoder=decoder,
                     prompt=PromptSpec(image_token="<file_sep>", between_parts=""))  # fmt: skip
    roles = {"decoder.gguf": "decoder", "encoder.onnx": "encoder", "encoder.onnx.data": "encoder-data"}
    files = tuple(
        bundles.FileEntry(
            name=name, size=(folder / name).stat().st_size, sha256=bundles.sha256_of(folder / name), role=role
        )
        for name, role in roles.items()
    )  # type: ignore[arg-type]
    bundles.write_manifest(
        folder, bundles.Manifest(format=bundles.FORMAT, spec=spec, files=files, provenance={}, fidelity={})
    )
    return folder


def llama_1b(folder: Path, sources: Path) -> Path:
    """A random model of Llama 3.2 1B's shape and vocabulary, as q4_k_m."""
    import bench_convert

    import edgevlm

    checkpoint = folder / "checkpoint"
    bench_convert.make_checkpoint(checkpoint, "1b", sources / "models" / "ggml-vocab-llama-bpe.gguf")
    settings = checkpoint / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    edgevlm.convert(checkpoint, folder / "bundle", decoder_quant="q4_k_m", fidelity_tokens=0, force=True)
    shutil.rmtree(checkpoint)
    return folder / "bundle"


def cases(folder: Path, sources: Path | None) -> list[Case]:
    import bench_encoder

    smollm2 = str(bench_encoder.smollm2())
    found = []
    for context in (512, 4096):
        found.append(Case(name=f"built-in, {context}", model=None, context=context, picture_px=(480, 640)))
        found.append(Case(name=f"SmolLM2-135M, {context}", model=smollm2, context=context))
    found.append(Case(name="SmolLM2-135M, 200 MB", model=smollm2, budget="200MB"))
    seeing = str(folder / "smolvlm")
    for tiles, picture_px in ((1, (512, 512)), (4, (512, 1536)), (17, (3000, 4000))):
        found.append(
            Case(name=f"SmolVLM-256M's shape, {tiles} tiles", model=seeing, context=4096, picture_px=picture_px)
        )
    for budget in ("600MB", "450MB"):
        found.append(Case(name=f"SmolVLM-256M's shape, {budget}", model=seeing, budget=budget, picture_px=(3000, 4000)))
    if sources or (folder / "llama-1b").exists():
        large = str(folder / "llama-1b" / "bundle")
        for context in (512, 4096):
            found.append(Case(name=f"Llama 3.2 1B's shape, {context}", model=large, context=context))
        for budget in ("1400MB", "1GB"):
            found.append(Case(name=f"Llama 3.2 1B's shape, {budget}", model=large, budget=budget))
    return found


def row(case: Case, result: Result) -> str:
    plan, mb = result.plan["settings"], 1e6
    kind = "copied" if plan["repack"] else "mapped"
    settings = f"{plan['context']}, {plan['batch']}, {kind}, {plan['encoder']}"
    peaks = f"{result.peak / mb:.0f} | {result.estimate / mb:.0f} | {100 * result.error:+.1f} %"
    kinds = f"{result.own / mb:.0f} | {result.estimate_own / mb:.0f} | {result.mapped / mb:.0f}"
    return f"| {case.name} | {settings} | {peaks} | {kinds} |"


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder = Path(given.get("folder", "build/check-memory"))
    sources = Path(given["llama.cpp"]) if "llama.cpp" in given else None
    if not (folder / "smolvlm").exists():
        smolvlm(folder / "smolvlm")
    if sources and not (folder / "llama-1b").exists():
        llama_1b(folder / "llama-1b", sources)
    print("| Model | Context, batch, weights, encoder | Peak, MB | Estimate | Error | Own | Estimate | Mapped |\n"
          "|---|---|---:|---:|---:|---:|---:|---:|", flush=True)  # fmt: skip
    for case in cases(folder, sources):
        if any(word in case.name for word in given.get("only", case.name).split(";")):
            print(row(case, measure(case)), flush=True)


if __name__ == "__main__":
    main()
