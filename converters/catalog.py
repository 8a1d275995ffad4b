"""docs/models.md, made from the families: `python -m edgevlm.converters.catalog > docs/models.md` (`make docs`).

Sizes are computed from the published configurations by the code that converts, on tensors that take no memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm import families
from edgevlm.converters import decoder, encoder, forecast, gguf_decoder, gguf_file, quant
from edgevlm.converters.huggingface import encoder_weights
from edgevlm.converters.mapping import Mapped, map_tensors, wanted_leaves
from edgevlm.converters.onnx_products import EncoderQuant
from edgevlm.converters.resolve import Resolved, resolve
from edgevlm.converters.safetensors import Tensor
from edgevlm.families.schema import Family, Part, Published

QUANTS = ("q4_k_m", "iq4_nl", "q5_k_m", "q8_0", "f16")
ENCODER_QUANTS: tuple[EncoderQuant, ...] = ("int8", "int4", "fp16", "fp32")
_CONTEXT = 4096  # what the runtime reserves by default
# Python, numpy and both runtimes; llama.cpp's buffers; a picture on its way. An allowance, not a measurement.
_RUNTIME_BYTES = 250 << 20
_BOARDS_GB = (1, 2, 4, 8, 16, 32, 64)

_HEAD = """# Models: what can be converted, how large it becomes, what it needs

Made from the families' declarations by `make docs`; `tests/test_catalog.py` compares.

Sizes in MB (10^6 bytes). The decoder's are its weights; the tokenizer adds 1 (32,000 tokens) to 8 MB (128,256 tokens),
and `edgevlm convert --dry-run` gives the exact size of a checkpoint at hand. *Device* is the smallest memory of the
usual boards that holds the `q4_k_m` model with its int8 encoder, 4,096 positions and half a gigabyte for the system.

Decoder types: {decoders}. Encoder types: {encoders}. *llama.cpp's pairs* are a text model's GGUF with an `mmproj` of
these projectors, as a source instead of the checkpoint.
"""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a published model.

    Attributes:
        decoder: Weights of the decoder for each recipe.
        encoder: Graph and data for each type; empty for a text-only model.
        cache: Keys and values of the runtime's default context.
        tokens: Of a picture or a tile; 0 for a text-only model.
    """

    decoder: Mapping[str, int]
    encoder: Mapping[EncoderQuant, int]
    cache: int
    tokens: int

    @property
    def running(self) -> int:
        """Memory of the default model at work."""
        return self.decoder["q4_k_m"] + self.encoder.get("int8", 0) + self.cache + _RUNTIME_BYTES


def sizes(family: Family, model: Published) -> Sizes:
    """What becomes of a published model."""
    resolved, mapped = _open(family, model)
    sources = gguf_decoder.sources(mapped)
    shapes = {name: source.tensor.shape for name, source in sources.items()}
    found = {}
    for name in QUANTS:
        kinds = decoder.stored_types(resolved, shapes, quant.RECIPES[name])
        tensors = gguf_decoder.plan(sources, resolved, kinds)
        found[name] = sum(gguf_file.padded(tensor.nbytes) for tensor in tensors)
    encoder: dict[EncoderQuant, int] = {}
    if resolved.vision:
        for kind in ENCODER_QUANTS:
            parts = encoder_weights(mapped.tower), encoder_weights(mapped.connector)
            encoder[kind] = sum(forecast.measure_encoder(*parts, resolved.vision, kind)[0])
    spec, llama = resolved.spec, resolved.llama
    positions = min(_CONTEXT, spec.decoder.context_length)
    cache = spec.decoder.layers * positions * llama.heads_kv * llama.head_dim * 2 * 2  # float16
    return Sizes(found, encoder, cache, spec.encoder.n_tokens if spec.encoder else 0)


def _open(family: Family, model: Published) -> tuple[Resolved, Mapped]:
    """A published model as if it lay here: every tensor is one zero, repeated."""
    tokens = dict(enumerate(family.vision.control_tokens)) if family.vision else {}
    keys = family.vision.image_token if family.vision else ()
    tokens |= {model.config[key]: "<image>" for key in keys if key in model.config}
    resolved = resolve(family, model.config, model.processor, tokens, name=model.name, tower=model.tower)
    found: dict[str, Tensor] = {}

    def add(part: Part, prefix: str, blocks: int) -> None:
        for leaf, (_, weight) in wanted_leaves(part.weights, blocks, resolved.sizes).items():
            found[prefix + leaf] = _zeros(prefix + leaf, tuple(resolved.sizes[size] for size in weight.shape))

    add(family.decoder, family.decoder_prefixes[0], resolved.spec.decoder.layers)
    if not model.tied:
        name = family.head_prefixes[0] + "weight"
        found[name] = _zeros(name, (resolved.sizes["vocab"], resolved.sizes["n_embd"]), 1)
    if family.vision and resolved.vision:
        add(resolved.vision.tower, family.vision.tower_prefixes[0], resolved.vision.encoder.layers)
        add(family.vision.connector, family.vision.connector_prefixes[0], 0)
    return resolved, map_tensors(family, resolved, found)


def _zeros(name: str, shape: tuple[int, ...], value: int = 0) -> Tensor:
    return Tensor(name, "BF16", shape, np.broadcast_to(np.uint16(value), shape))


def page() -> str:
    """The whole page."""
    types = {"decoders": ", ".join(quant.RECIPES), "encoders": ", ".join(encoder.ENCODER_QUANTS)}
    parts = [_HEAD.format(**types), _summary()]
    for family in families.families():
        parts.append(_section(family))
    return "\n".join(parts)


def _summary() -> str:
    head = ["Family", "`architectures` in config.json", "Pictures", "llama.cpp's pairs"]
    lines = [_row(head), _row(["---"] * len(head))]
    for family in families.families():
        names = ", ".join(f"`{name}`" for name in family.hf_architectures)
        needs = "".join(f", `{key}`{_values(values)}" for key, values in family.needs.items())
        towers = ", ".join(tower.kind for tower in family.vision.towers) if family.vision else "no"
        apart = " (apart: `--tower`)" if family.vision and family.vision.separate else ""
        pairs = ", ".join(f"`{declared.projector}`" for declared in family.mmproj) or "no"
        lines.append(f"| {family.title} | {names}{needs} | {towers}{apart} | {pairs} |")
    return "\n".join(lines) + "\n"


def _values(values: tuple[object, ...]) -> str:
    return "" if not values else " " + " or ".join("absent" if value is None else f"`{value}`" for value in values)


def _section(family: Family) -> str:
    found = {model.name: sizes(family, model) for model in family.published}
    sees = family.vision is not None
    pictures = ["Tokens", *(f"encoder {kind}" for kind in ENCODER_QUANTS)] if sees else []
    head = ["Model", *QUANTS, *pictures, "Cache", "Running", "Device"]
    lines = [f"## {family.title}\n", _row(head), _row(["---"] * len(head))]
    for name, model in found.items():
        picture = [str(model.tokens), *(_mb(model.encoder[kind]) for kind in ENCODER_QUANTS)] if sees else []
        decoders = [_mb(model.decoder[kind]) for kind in QUANTS]
        lines.append(_row([name, *decoders, *picture, _mb(model.cache), _mb(model.running), device(model.running)]))
    lines.append("")
    for card in family.published:
        places = ", ".join(f"`{place}`" for place in card.repositories)
        lines.append(f"- **{card.name}**: {places}; {' or '.join(card.layouts)}. Licence: {card.licence}.")
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mb(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 1e6):,}"


def device(nbytes: int) -> str:
    """The smallest usual memory that holds so much beside half a gigabyte for the system."""
    return next((f"{size} GB" for size in _BOARDS_GB if nbytes + (512 << 20) <= size << 30), "more")


if __name__ == "__main__":
    sys.stdout.write(page())
