"""Time and memory of a conversion beside llama.cpp's own route, on random checkpoints of Llama 3.2's sizes.

    python tests/bench_convert.py llama.cpp=SOURCES [shape=1b,3b] [folder=DIR] [rounds=2]

SOURCES is llama.cpp's source tree of the pinned llama-cpp-python (`vendor/llama.cpp` of its source archive): its
convert_hf_to_gguf.py is measured, followed by llama_model_quantize in a process of its own, which is all that
llama-quantize calls. Its vocabulary of Llama 3 becomes the checkpoints' tokenizer.
The routes take turns, each in a fresh process, with a warm page cache. `make bench-convert` does all this.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgevlm.machine import cpu_name, usable_cpus

SHAPES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOCK = 1 << 22
_SAMPLE_S = 0.01
# It imports sentencepiece before it looks whether there is anything to read with it, and here is nothing. So any module
# will do, as long as transformers has seen before that the package is missing.
CONVERT = """
import runpy, sys, types
try:
    import sentencepiece
except ImportError:
    from transformers.utils import is_sentencepiece_available
    is_sentencepiece_available()
    sys.modules["sentencepiece"] = types.ModuleType("sentencepiece")
    sys.modules["sentencepiece"].SentencePieceProcessor = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp as native
native.llama_backend_init()
params = native.llama_model_quantize_default_params()
params.ftype, params.nthread = 15, int(sys.argv[3])
sys.exit(native.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


# the checkpoint


def config(shape: str) -> dict[str, Any]:
    sizes = SHAPES[shape]
    return {**COMMON, **sizes, "intermediate_size": 512 if shape == "tiny" else 8192}


def shapes(numbers: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, in the order of the file."""
    width, hidden = numbers["hidden_size"], numbers["intermediate_size"]
    q = numbers["num_attention_heads"] * numbers["head_dim"]
    kv = numbers["num_key_value_heads"] * numbers["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (numbers["vocab_size"], width)}
    for i in range(numbers["num_hidden_layers"]):
        block = {
            "input_layernorm": (width,), "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, q), "post_attention_layernorm": (width,),
            "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {**found, "model.norm.weight": (width,)}


def make_checkpoint(folder: Path, shape: str, vocabulary: Path, seed: int = 1) -> None:
    """Write a checkpoint of random bfloat16 numbers, a few megabytes at a time."""
    folder.mkdir(parents=True)
    numbers = config(shape)
    (folder / "config.json").write_text(json.dumps(numbers))
    write_tokenizer(folder, vocabulary)
    header, position = {}, 0
    for name, sizes in shapes(numbers).items():
        nbytes = 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, sizes in shapes(numbers).items():
            count = int(np.prod(sizes))
            for start in range(0, count, _BLOCK):
                bits = np.frombuffer(random.bytes(2 * min(_BLOCK, count - start)), "<u2")
                # near 1, or of either sign between 2^-7 and 2^-5
                (bits & 0x001F | 0x3F80 if "norm" in name else bits & 0x80FF | 0x3C00).astype("<u2").tofile(file)


def write_tokenizer(folder: Path, vocabulary: Path) -> None:
    """Llama 3's tokenizer as Hugging Face stores it, from llama.cpp's file of the same vocabulary."""
    fields = gguf.GGUFReader(vocabulary).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    merges = fields["tokenizer.ggml.merges"].contents()
    added = [i for i, kind in enumerate(kinds) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = tokens[128000]
    pre = [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": begin, "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [128000], "tokens": [begin]}},
    }  # fmt: skip
    ordinary = {text: i for i, text in enumerate(tokens) if kinds[i] != 3}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "post_processor": template,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": ordinary, "merges": [merge.split(" ") for merge in merges]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": tokens[128001],
                "model_max_length": 131072}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# the routes


@dataclass(frozen=True)
class Run:
    """What one process took; peaks in bytes.

    Attributes:
        seconds: Of the wall.
        cpu_s: Of all processors.
        peak: Most resident at once (VmHWM): own memory and pages of mapped files.
        own: Most of its own memory (RssAnon), seen every 10 ms.
        mapped: Most pages of mapped files (RssFile), seen every 10 ms; the system may drop them.
        first_s: Until it printed something that can be seen; None if it never did.
    """

    seconds: float
    cpu_s: float
    peak: int
    own: int
    mapped: int
    first_s: float | None = None


def measure(command: list[str]) -> Run:
    """Run a command that must succeed."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
        first: list[float] = []
        done = threading.Event()
        assert process.stdout is not None
        assert process.stderr is not None
        output = process.stdout.fileno()

        def listen() -> None:
            while piece := os.read(output, 1 << 16):
                if piece.strip() and not first:
                    first.append(time.perf_counter() - begin)

        def watch() -> None:
            while not done.wait(_SAMPLE_S):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                for name in seen:
                    found = status.partition(f"{name}:")[2].split()
                    seen[name] = max(seen[name], int(found[0]) * 1024 if found else 0)

        threads = [threading.Thread(target=target) for target in (watch, listen)]
        for thread in threads:
            thread.start()
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        done.set()
        for thread in threads:
            thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode(errors='replace')[-2000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu_s, seen["VmHWM"], seen["RssAnon"], seen["RssFile"], first[0] if first else None)


def ours(checkpoint: Path, work: Path, *options: str) -> dict[str, Run]:
    out = work / "bundle"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "edgevlm", "convert", str(checkpoint), str(out), "--force", *options]
    return {"edgevlm convert " + " ".join(options): measure(command)}


def theirs(checkpoint: Path, work: Path, sources: Path) -> dict[str, Run]:
    plain, final = work / "plain.gguf", work / "final.gguf"
    options = ["--outfile", str(plain), "--outtype", "bf16"]
    convert = [sys.executable, "-c", CONVERT, str(sources / "convert_hf_to_gguf.py"), str(checkpoint), *options]
    runs = {"convert_hf_to_gguf.py": measure(convert)}
    quantize = [sys.executable, "-c", QUANTIZE, str(plain), str(final), str(usable_cpus())]
    runs["llama_model_quantize"] = measure(quantize)
    plain.unlink()
    final.unlink()
    return runs


def compare(shape: str, sources: Path, folder: Path, rounds: int) -> dict[str, list[Run]]:
    """Every route in turn, `rounds` times; the conversion with its comparison of predictions once, at the end."""
    checkpoint, work = folder / f"llama-3.2-{shape}", folder / "work"
    shutil.rmtree(checkpoint, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    print(f"making {checkpoint}", file=sys.stderr, flush=True)
    make_checkpoint(checkpoint, shape, sources / "models" / "ggml-vocab-llama-bpe.gguf")
    found: dict[str, list[Run]] = {}
    try:
        turns = [
            lambda: ours(checkpoint, work, "--fidelity-tokens", "0"),
            lambda: theirs(checkpoint, work, sources),
        ]
        for turn in [*turns * rounds, lambda: ours(checkpoint, work)]:
            for name, run in turn().items():
                found.setdefault(name, []).append(run)
                print(f"  {name}: {run.seconds:.1f} s, {run.cpu_s:.1f} s of processors", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(checkpoint)
        shutil.rmtree(work)
    return found


def table(shape: str, found: dict[str, list[Run]]) -> str:
    """Medians of the times, largest peaks."""
    lines = [
        f"| {shape.upper()} | Seconds | Of processors | Peak, MB | Own memory | Mapped files |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        seconds, cpu_s = (statistics.median(getattr(run, what) for run in runs) for what in ("seconds", "cpu_s"))
        peaks = (max(getattr(run, what) for run in runs) / 1e6 for what in ("peak", "own", "mapped"))
        figures = (f"{seconds:.1f}", f"{cpu_s:.1f}", *(f"{peak:.0f}" for peak in peaks))
        lines.append(f"| {name.strip()} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sources = Path(given["llama.cpp"])
    folder = Path(given.get("folder", "build/bench-convert"))
    packages = ("edgevlm", "llama-cpp-python", "torch", "transformers", "numpy")
    print(f"{cpu_name()}, {usable_cpus()} usable CPUs, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    results = {}
    for shape in given.get("shape", "1b,3b").split(","):
        results[shape] = compare(shape, sources, folder, int(given.get("rounds", "2")))
        print(f"\n{table(shape, results[shape])}", flush=True)
    print(json.dumps({shape: {name: [vars(run) for run in runs] for name, runs in found.items()}
                      for shape, found in results.items()}))  # fmt: skip


if __name__ == "__main__":
    main()
