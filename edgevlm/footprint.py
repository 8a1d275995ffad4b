"""How much memory a model takes, estimated from its files before anything is loaded.

Memory is of two kinds. *Own* memory (the kernel's RssAnon) stays until it is freed; *mapped* memory are pages of files
(RssFile), which the system may drop and read again. The peak of both together is what Linux reports as VmHWM.
Formulas are those of llama.cpp's log of its buffers and of measurements; `docs/memory.md` has both beside each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgevlm.gguf import GGUFHeader, TensorInfo
from edgevlm.machine import resident_bytes
from edgevlm.spec import EncoderSpec, ImageSpec
from edgevlm.tiling import grid_of

_MB = 1_000_000
#: llama.cpp rounds contexts up to this.
_CONTEXT_STEP = 256
#: What importing and first using a library takes, own and mapped, if it is not there yet (x86-64 Linux, measured).
_LIBRARIES = {
    "numpy": (5.3, 6.2), "llama_cpp": (6.5, 5.2), "PIL": (0.9, 1.4), "jinja2": (2.0, 0.5), "onnxruntime": (8.8, 25.9),
}  # fmt: skip
#: Pages of llama.cpp's code that running it brings in.
_CODE = int(2.6 * _MB)
#: ONNX Runtime's objects of a session, of which nothing comes back; llama.cpp's of a model and its context.
_SESSION, _CONTEXT = 5 * _MB, 4 * _MB
#: For each entry of the vocabulary, and for each merge, in llama.cpp and in our header.
_TOKEN_BYTES, _MERGE_BYTES = 260, 174
#: Bytes of a merge in the file, about.
_MERGE_IN_FILE = 16
#: For each position of the context: llama.cpp's cells, and what we hold of it.
_CELL_BYTES = 100
_KV_BYTES = {"f16": 2, "f32": 4}
#: A camera's picture, if nobody says how large pictures will be.
PICTURE_PX = (3000, 4000)

# enum ggml_type -> what the CPU must be able to do for llama.cpp to copy such a weight into another layout, and of what
# the number of rows must be a multiple (`ggml_repack_get_optimal_repack_type` of repack.cpp): any of the sets will do
_REPACKED: Mapping[int, tuple[tuple[frozenset[str], int], ...]] = {
    2: ((frozenset({"AVX2"}), 8), (frozenset({"NEON", "MATMUL_INT8"}), 4), (frozenset({"NEON", "DOTPROD"}), 4)),
    8: ((frozenset({"NEON", "MATMUL_INT8"}), 4), (frozenset({"NEON", "DOTPROD"}), 4)),
    10: ((frozenset({"AVX512"}), 8),),
    12: ((frozenset({"AVX2"}), 8), (frozenset({"NEON", "MATMUL_INT8"}), 8), (frozenset({"NEON", "DOTPROD"}), 8)),
    13: ((frozenset({"NEON", "MATMUL_INT8"}), 8), (frozenset({"NEON", "DOTPROD"}), 8)),
    14: ((frozenset({"NEON", "MATMUL_INT8"}), 8), (frozenset({"NEON", "DOTPROD"}), 8)),
    20: ((frozenset({"AVX2"}), 8), (frozenset({"NEON", "DOTPROD"}), 4)),
    39: ((frozenset({"AVX2"}), 8), (frozenset({"NEON", "DOTPROD"}), 4)),
}


@dataclass(frozen=True)
class Part:
    """Bytes of one purpose: own memory, and pages of files."""

    own: int = 0
    mapped: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.own + other.own, self.mapped + other.mapped)

    @property
    def total(self) -> int:
        return self.own + self.mapped


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a plan may choose.

    Attributes:
        context: Positions.
        kv_type: Type of the key/value cache.
        batch: Positions decoded in one call.
        scored: Rows of logits that are read at once.
        repack: Whether the decoder's weights are copied into a faster layout.
        encoder: `resident`, or `released`: it is loaded for each new picture, in turn with the decoder.
    """

    context: int
    kv_type: Literal["f16", "f32"] = "f16"
    batch: int = 512
    repack: bool = True
    scored: int = 1
    encoder: Literal["resident", "released"] = "resident"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The estimate: parts by purpose, each at its largest.

    Attributes:
        process: Interpreter and libraries, and whatever else this process holds already.
        vocabulary: Tokens and merges.
        weights: The decoder's.
        cache: Keys and values of all positions.
        buffers: What a batch needs while it is computed.
        encoder: The encoder's weights and session.
        activations: What it needs for one tile.
        picture: A decoded picture.
        tiles: The encoder's input and output for it.
        released: Whether encoder and decoder take turns.
    """

    process: Part
    vocabulary: Part
    weights: Part
    cache: Part
    buffers: Part
    encoder: Part = Part()
    activations: Part = Part()
    picture: Part = Part()
    tiles: Part = Part()
    released: bool = False

    @property
    def peak(self) -> Part:
        """The most at any time, whatever is asked in whatever order."""
        base = self.process + self.vocabulary
        decoding = self.weights + self.cache + self.buffers
        encoding = self.encoder + self.activations + self.tiles
        if not self.released:
            return base + decoding + encoding + self.picture
        return base + max(decoding + self.picture, encoding + self.picture, key=lambda part: part.total)

    @property
    def new(self) -> Part:
        """Of the peak, what is not there yet."""
        now = resident()
        return Part(max(0, self.peak.own - now.own), max(0, self.peak.mapped - now.mapped))

    def parts(self) -> dict[str, Part]:
        """By name, without those that take nothing."""
        names = ("process", "vocabulary", "weights", "cache", "buffers", "encoder", "activations", "picture", "tiles")
        return {name: part for name in names if (part := getattr(self, name)).total}


def decoder_footprint(
    header: GGUFHeader, settings: Settings, features: frozenset[str], before: Part | None = None
) -> Footprint:
    """What a text model takes, with the interpreter around it.

    Args:
        header: Of the GGUF file.
        settings: As it will be loaded.
        features: What llama.cpp makes use of on this CPU (`edgevlm.llama.cpu_features`).
        before: What this process held before the header was read; None is what it holds now.
    """
    known = header.metadata
    tokens = len(known["tokenizer.ggml.tokens"])
    first, end = header.places.get("tokenizer.ggml.merges", (0, 0))
    merges = (end - first) // _MERGE_IN_FILE
    mapped = sum(tensor.nbytes for tensor in header.tensors)
    copies = sum(tensor.nbytes for tensor in _repacked(header.tensors, features)) if settings.repack else 0
    cells = -(-settings.context // _CONTEXT_STEP) * _CONTEXT_STEP
    shape = _Shape.of(header)
    kv = shape.layers * 2 * shape.kv * cells * _KV_BYTES[settings.kv_type]
    return Footprint(
        process=(before or resident()) + _libraries(["numpy", "llama_cpp", "jinja2"]) + Part(0, _CODE),
        vocabulary=Part(tokens * _TOKEN_BYTES + merges * _MERGE_BYTES),
        weights=Part(copies, mapped),
        cache=Part(kv + cells * _CELL_BYTES),
        buffers=Part(int(_compute_bytes(shape, settings, cells) + _CONTEXT)),
    )


def with_encoder(
    found: Footprint,
    spec: EncoderSpec,
    image: ImageSpec,
    nbytes: int,
    *,
    released: bool = False,
    scores: bool = True,
    picture_px: tuple[int, int] = PICTURE_PX,
) -> Footprint:
    """Add what an encoder takes.

    Args:
        found: The decoder's.
        spec: The encoder's sizes.
        image: How pictures are cut.
        nbytes: Size of its weights' file.
        released: Whether it takes turns with the decoder.
        scores: Whether the scores of all heads are held at once.
        picture_px: Height and width of the largest picture.
    """
    patches = (image.height_px // spec.patch_px) * (image.width_px // spec.patch_px) + (spec.tower == "clip")
    weights, scratch = _encoder_weights(spec, nbytes)
    rows, columns = grid_of(*picture_px, image)
    n_tiles = rows * columns + 1
    tile_bytes = 3 * image.height_px * image.width_px * 4
    return replace(
        found,
        process=found.process + _libraries(["PIL", "onnxruntime"]) + Part(_SESSION),
        encoder=Part(int(weights)),
        activations=Part(int(_activation_bytes(spec, patches, scores=scores) + scratch)),
        picture=Part(4 * picture_px[0] * picture_px[1]),
        tiles=Part(n_tiles * (tile_bytes + 2 * 4 * spec.n_tokens * spec.n_embd)),
        released=released,
    )


def image_positions(spec: EncoderSpec, image: ImageSpec, picture_px: tuple[int, int] = PICTURE_PX) -> int:
    """About how many positions a picture takes in the context, texts around its tiles included."""
    rows, columns = grid_of(*picture_px, image)
    return (rows * columns + 1) * (spec.n_tokens + 8)


@dataclass(frozen=True)
class _Shape:
    """Sizes of the language model, in numbers of floats for each position."""

    layers: int
    width: int
    hidden: int
    heads: int
    q: int
    kv: int
    vocab: int
    #: Bytes for each float of an operand as it is multiplied with the weights.
    operand: float

    @classmethod
    def of(cls, header: GGUFHeader) -> _Shape:
        known = header.metadata
        heads, width = known["llama.attention.head_count"], known["llama.embedding_length"]
        head = known.get("llama.attention.key_length", width // heads)
        floats = any(tensor.type_id in (1, 30) and len(tensor.shape) == 2 for tensor in header.tensors)
        return cls(
            layers=known["llama.block_count"],
            width=width,
            hidden=known["llama.feed_forward_length"],
            heads=heads,
            q=heads * head,
            kv=known.get("llama.attention.head_count_kv", heads) * head,
            vocab=len(known["tokenizer.ggml.tokens"]),
            operand=2.0 if floats else 1.15,
        )


def _compute_bytes(shape: _Shape, settings: Settings, cells: int) -> float:
    """llama.cpp's "compute buffer size", fitted over nine shapes, with the buffer for quantized operands.

    What is alive at once: in the feed-forward part, and in attention; without flash attention (float32 cache) the
    scores of all heads as well. Beside it lies the mask.
    """
    exact = settings.kv_type == "f32"
    feed_forward = 3 * shape.hidden + 4 * shape.width
    attention = 3 * shape.width + 2 * shape.q + 2 * shape.kv + (shape.heads * cells if exact else 0)
    mask = cells * (4 if exact else 2)
    operands = shape.operand * max(shape.hidden, shape.width, shape.q)
    logits = settings.scored * (shape.vocab + 2 * shape.width)
    alive = 4 * max(settings.batch * feed_forward, settings.batch * attention, logits)
    return alive + settings.batch * (mask + operands + 24) + 4 * settings.scored * shape.vocab


def _repacked(tensors: Iterable[TensorInfo], features: frozenset[str]) -> list[TensorInfo]:
    """Weights that llama.cpp copies into another layout; the table of tokens if it is the head as well."""
    if "REPACK" not in features:
        return []
    tensors = list(tensors)
    names = {tensor.name for tensor in tensors}
    found = []
    for tensor in tensors:
        product = tensor.name != "token_embd.weight" or "output.weight" not in names
        ways = _REPACKED.get(tensor.type_id, ())
        if (
            len(tensor.shape) == 2
            and product
            and any(needed <= features and tensor.shape[0] % rows == 0 for needed, rows in ways)
        ):
            found.append(tensor)
    return found


def _encoder_weights(spec: EncoderSpec, nbytes: int) -> tuple[float, float]:
    """(bytes of the weights in memory, scratch besides), by the width of the stored weights.

    ONNX Runtime copies weights into the layout of its kernels and lets the file go. Those of 16 bits become float32,
    for want of kernels; those of four are unpacked a matrix at a time.
    """
    weights = spec.layers * (4 * spec.hidden**2 + 2 * spec.hidden * spec.intermediate)
    matrix = 4 * spec.hidden * spec.intermediate
    width = nbytes / max(1, weights)
    if 1.6 <= width < 3:
        return 2 * nbytes, 4 * matrix
    return nbytes, 4.8 * matrix if width < 0.9 else 0


def _activation_bytes(spec: EncoderSpec, patches: int, *, scores: bool) -> int:
    """Of one tile: scores of all heads, queries, keys and values, and the feed-forward part."""
    attention = spec.heads * patches**2 if scores else 3 * patches * spec.hidden
    hidden = spec.intermediate * (3.0 if spec.activation == "quick_gelu" else 1.5)
    return int(4 * (attention + patches * (3 * spec.hidden + hidden)))


def resident() -> Part:
    """What this process holds now."""
    return Part(*resident_bytes())


def _libraries(names: list[str]) -> Part:
    """What these libraries will take, without those that are there already."""
    missing = [_LIBRARIES[name] for name in names if name not in sys.modules]
    return Part(*(int(sum(part) * _MB) for part in ((own for own, _ in missing), (files for _, files in missing))))
