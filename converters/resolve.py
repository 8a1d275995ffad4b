"""A family and a checkpoint's JSON files, resolved into numbers: the `ModelSpec` and the sizes of all tensors.

Nothing is guessed. A key that the family does not list, a value that we cannot run and a number that contradicts
another are errors: a model converted with the wrong mathematics answers, only worse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm import spec as specs
from edgevlm.converters.resolve_image import resolve_image, square
from edgevlm.converters.resolve_slices import resolve_slices
from edgevlm.converters.sections import LARGEST_NUMBER, Section, invalid, unsupported
from edgevlm.errors import BundleError
from edgevlm.families.schema import Family, Tower, Vision
from edgevlm.spec import DecoderSpec, EncoderSpec, ImageSpec, ModelSpec, PromptSpec

_STRATEGIES = {"default": "default", "full": "full", "patch": "default", "cls_patch": "full"}
IMAGE_LITERAL = "<image>"  # what templates print where no token stands for a picture
RESAMPLER_HEAD = 128  # channels of a resampler's attention head; no file says so
_MOST_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS; it aborts beyond


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """What a GGUF file of architecture `llama` needs beyond `DecoderSpec`."""

    n_ff: int
    heads: int
    heads_kv: int
    head_dim: int
    rms_eps: float
    rope: Mapping[str, Any]
    tied: bool
    bos: int | None
    eos: int | None
    pad: int | None


@dataclass(frozen=True, kw_only=True)
class ResolvedVision:
    """The numbers of a tower and its connector.

    Attributes:
        image, encoder: What the runtime will obey.
        tower: The tower that the checkpoint has.
        cut_first: Whether the first position of the selected state is cut off.
        connector_bias: Whether the connector's layers have biases.
        tower_layers: Blocks in the checkpoint; `encoder.layers` of them run.
        positions: Rows of the tower's position table.
    """

    image: ImageSpec
    encoder: EncoderSpec
    tower: Tower
    cut_first: bool
    connector_bias: bool
    tower_layers: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """All numbers of one checkpoint.

    Attributes:
        spec: What the runtime will obey.
        llama: Sizes of the decoder.
        vision: None if the model knows text only.
        sizes: Size names that `Weight.shape`, `.transform` and `.when` refer to.
    """

    spec: ModelSpec
    llama: LlamaSizes
    vision: ResolvedVision | None
    sizes: Mapping[str, int]


def resolve(
    family: Family,
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    tokens: Mapping[int, str],
    *,
    name: str,
    tower: Mapping[str, Any] | None = None,
) -> Resolved:
    """Resolve one checkpoint.

    Args:
        family: Found by `edgevlm.families.find`.
        config: config.json.
        processor: preprocessor_config.json, or the image processor's part of processor_config.json; None for a family
            that knows text only.
        tokens: Token texts by id, to name the image token.
        name: What the model shall be called.
        tower: config.json of the tower's own checkpoint, for a family that has one.

    Raises:
        CheckpointError: `checkpoint.invalid` for contradictions, `checkpoint.unsupported` for what we cannot run.
    """
    top, text = _sections(family, config)
    decoder = DecoderSpec(
        arch="llama",
        layers=text.size("num_hidden_layers", _MOST_LAYERS),
        n_embd=text.size("hidden_size"),
        vocab=text.size("vocab_size"),
        context_length=_context_length(family, text),
    )
    vision, image_token, tile_texts = None, None, None
    if family.vision is not None:
        assert processor is not None
        vision = resolve_vision(family, top, processor, tower, n_embd=decoder.n_embd)
        image_token, tile_texts = _image_token(family.vision, top, tokens), family.vision.tile_texts
    spec = ModelSpec(
        name=name,
        family=family.name,
        image=vision.image if vision else None,
        encoder=vision.encoder if vision else None,
        decoder=decoder,
        prompt=PromptSpec(
            image_token=image_token,
            tile_texts=tile_texts,
            between_parts=family.vision.between_parts if family.vision else None,
        ),
    )
    check_ranges(spec)
    llama = _resolve_llama(top, text)
    sizes = _decoder_sizes(decoder, llama) | (vision_sizes(vision) if vision else {})
    return Resolved(spec=spec, llama=llama, vision=vision, sizes=sizes)


def _sections(family: Family, config: Mapping[str, Any]) -> tuple[Section, Section]:
    """config.json and its part for the decoder, which may be the same."""
    connector = (family.vision.connector.keys,) if family.vision else ()
    if family.text_section is None:
        _check_decoder_kind(family, "config.json", config)
        whole = Section("config.json", config, family.keys, *connector, family.decoder.keys)
        return whole, whole
    top = Section("config.json", config, family.keys, *connector)
    text_data = top.get(family.text_section)
    _check_decoder_kind(family, f"config.json: {family.text_section}", text_data)
    return top, Section(f"config.json: {family.text_section}", text_data, family.decoder.keys, family.text_keys)


def _context_length(family: Family, text: Section) -> int:
    """Positions that the runtime may use.

    Up to the length of a sliding window every position sees all before it, which is what the runtime computes.
    """
    longest = text.size("max_position_embeddings")
    if "sliding_window" not in family.decoder.keys.read or text.get("sliding_window") is None:
        return longest
    return min(longest, text.size("sliding_window"))


def check_ranges(spec: ModelSpec) -> None:
    """Refuse numbers that the runtime would refuse to read back from bundle.json."""
    try:
        specs.from_json(ModelSpec, json.loads(json.dumps(specs.to_json(spec))))
    except BundleError as error:
        raise unsupported(f"the checkpoint's numbers cannot be run: {str(error).split('; convert')[0]}") from error


def _decoder_sizes(decoder: DecoderSpec, llama: LlamaSizes) -> dict[str, int]:
    """The names in which families give a decoder's shapes."""
    return {
        "n_embd": decoder.n_embd,
        "n_ff": llama.n_ff,
        "vocab": decoder.vocab,
        "heads": llama.heads,
        "heads_kv": llama.heads_kv,
        "q_rows": llama.heads * llama.head_dim,
        "kv_rows": llama.heads_kv * llama.head_dim,
    }


def vision_sizes(vision: ResolvedVision) -> dict[str, int]:
    """The names in which families give a tower's and a connector's shapes."""
    encoder = vision.encoder
    return {
        "channels": 3,
        "hidden": encoder.hidden,
        "intermediate": encoder.intermediate,
        "patch": encoder.patch_px,
        "positions": vision.positions,
        "features": encoder.hidden * encoder.scale_factor**2,
        "queries": encoder.n_tokens,
        "n_embd_x3": 3 * encoder.n_embd,
        "post_norm": int(encoder.post_norm),
        "connector_bias": int(vision.connector_bias),
    }


def _check_decoder_kind(family: Family, where: str, text: Any) -> None:
    known = family.decoder_model_types
    found = text.get("model_type", known[0]) if isinstance(text, dict) else known[0]
    if found not in known:
        raise unsupported(f"{where}.model_type is {found!r}, the family {family.name} has {' or '.join(known)}")


def resolve_vision(
    family: Family, top: Section, processor: Mapping[str, Any], own: Mapping[str, Any] | None, *, n_embd: int
) -> ResolvedVision:
    """Resolve tower, connector and image processor.

    Args:
        family: One with a `vision`.
        top: The top level of config.json.
        processor: As in `resolve`.
        own: config.json of the tower's own checkpoint, or None if the tower is a section of `top`.
        n_embd: Width of the embeddings that the decoder takes.

    Raises:
        CheckpointError: as in `resolve`.
    """
    declared = family.vision
    assert declared is not None
    data = top.get(declared.section) if own is None else own.get(declared.section, own)
    tower = _find_tower(family, declared, data)
    if declared.post_norm and all(weight.when != "post_norm" for weight in tower.weights.values()):
        raise unsupported(f"the family {family.name} wants the last norm, which no state of {tower.model_type} has")
    section = Section(f"{top.where}: {declared.section}", data, tower.keys)
    positions = (section.size("image_size") // section.size("patch_size")) ** 2 + tower.class_token
    cut_first = _strategy(declared, top) == "default"
    if "mm_hidden_size" in family.keys.read and top.get("mm_hidden_size") not in (None, section.size("hidden_size")):
        raise invalid(f"mm_hidden_size is {top.get('mm_hidden_size')!r}, the tower has {section.size('hidden_size')}")
    return ResolvedVision(
        image=_resolve_image(declared, top, processor, section),
        encoder=_resolve_encoder(family, declared, tower, top, section, n_tokens=positions - cut_first, n_embd=n_embd),
        tower=tower,
        cut_first=cut_first,
        connector_bias=_connector_bias(declared, top),
        tower_layers=section.size("num_hidden_layers", _MOST_LAYERS),
        positions=positions,
    )


def _resolve_image(declared: Vision, top: Section, processor: Mapping[str, Any], tower: Section) -> ImageSpec:
    if declared.slices:
        return resolve_slices(declared, top, processor, patch_px=tower.size("patch_size"))
    image = resolve_image(declared.processors, processor, side_px=tower.size("image_size"))
    return square(image, top, declared.aspect) if declared.aspect else image


def _find_tower(family: Family, declared: Vision, data: Any) -> Tower:
    found = data.get("model_type") if isinstance(data, dict) else None
    for tower in declared.towers:
        if found == tower.model_type or (found or "") in tower.aliases:
            return tower
    supported = ", ".join(tower.model_type for tower in declared.towers)
    raise unsupported(f"{declared.section}.model_type is {found!r}; the family {family.name} supports {supported}")


def _resolve_encoder(
    family: Family, declared: Vision, tower: Tower, top: Section, vision: Section, *, n_tokens: int, n_embd: int
) -> EncoderSpec:
    hidden, heads = vision.size("hidden_size"), vision.size("num_attention_heads")
    if hidden % heads:
        raise invalid(f"{vision.where}: {heads} attention heads do not divide the width {hidden}")
    factor = top.size("scale_factor") if "scale_factor" in declared.connector.keys.read else 1
    grid = vision.size("image_size") // vision.size("patch_size")
    if grid % factor:
        raise invalid(f"{top.where}: scale_factor {factor} does not divide the tower's grid of {grid}x{grid} patches")
    n_tokens //= factor**2
    if declared.connector.kind == "resampler":
        n_tokens = _queries(top, n_embd)
    said = top.get("image_seq_length") if "image_seq_length" in family.keys.read else None
    if said is not None and (type(said), said) != (int, n_tokens):
        raise invalid(f"{top.where} says image_seq_length {said!r}, the tower gives {n_tokens} positions")
    has_activation = "projector_hidden_act" in declared.connector.keys.read
    return EncoderSpec(
        tower=tower.kind,  # type: ignore[arg-type]
        connector=declared.connector.kind,  # type: ignore[arg-type]
        layers=_selected_layers(declared, top, vision.size("num_hidden_layers", _MOST_LAYERS)),
        hidden=hidden,
        heads=heads,
        intermediate=vision.size("intermediate_size"),
        patch_px=vision.size("patch_size"),
        layer_norm_eps=vision.number("layer_norm_eps"),
        activation=vision.activation("hidden_act"),
        post_norm=declared.post_norm,
        connector_activation=top.activation("projector_hidden_act") if has_activation else "gelu",
        n_tokens=n_tokens,
        n_embd=n_embd,
        scale_factor=factor,
    )


def _queries(top: Section, n_embd: int) -> int:
    """Embeddings that a resampler makes of a picture of any size."""
    if n_embd % RESAMPLER_HEAD:
        raise unsupported(f"the resampler has heads of {RESAMPLER_HEAD}, which do not divide the width {n_embd}")
    return top.size("query_num")


def _selected_layers(declared: Vision, top: Section, layers: int) -> int:
    """How many blocks run before the selected state; state 0 is the input of the first block.

    In transformers 5 the last state of CLIP and SigLIP is the last block's output, without the norm that follows it
    (`capture_outputs(tie_last_hidden_states=False)`), as it was in transformers 4.
    """
    index: Any = declared.feature_layer if isinstance(declared.feature_layer, int) else top.get(declared.feature_layer)
    if isinstance(index, list) and len(index) == 1:
        index = index[0]
    if isinstance(index, list):
        raise unsupported(f"{declared.feature_layer} joins {len(index)} states ({index}), only one state can be used")
    if type(index) is not int or not -layers - 1 <= index <= layers:
        raise invalid(f"{declared.feature_layer} is {index!r}, the tower has the states 0 to {layers}")
    return index if index >= 0 else layers + 1 + index


def _strategy(declared: Vision, top: Section) -> str:
    literal = declared.feature_strategy in ("default", "full")
    return declared.feature_strategy if literal else top.choice(declared.feature_strategy, _STRATEGIES)


def _connector_bias(declared: Vision, top: Section) -> bool:
    if "multimodal_projector_bias" not in declared.connector.keys.read:
        return True
    return top.flag("multimodal_projector_bias")


def _image_token(declared: Vision, top: Section, tokens: Mapping[int, str]) -> str:
    missing = set(declared.control_tokens) - set(tokens.values())
    if missing:
        raise invalid(f"the tokenizer lacks {', '.join(sorted(missing))}, which stands around every picture")
    if not declared.image_token:
        return IMAGE_LITERAL
    ids = [top.token_id(key) for key in declared.image_token]
    found = next((index for index in ids if index is not None), None)
    if found is None:
        raise invalid(f"config.json names no image token; it needs one of {', '.join(declared.image_token)}")
    if found not in tokens:
        raise invalid(f"config.json says the image token has id {found}, which the tokenizer does not have")
    return tokens[found]


def _resolve_llama(top: Section, text: Section) -> LlamaSizes:
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    heads_kv = heads if text.get("num_key_value_heads") is None else text.size("num_key_value_heads")
    if text.get("head_dim") is None and hidden % heads:
        raise invalid(f"{text.where}: {heads} attention heads do not divide the width {hidden}")
    head_dim = hidden // heads if text.get("head_dim") is None else text.size("head_dim")
    if heads % heads_kv or head_dim % 2:
        raise invalid(f"{text.where}: {heads} heads of width {head_dim} cannot share {heads_kv} key/value heads")
    pad = text.token_id("pad_token_id")
    return LlamaSizes(
        n_ff=text.size("intermediate_size"),
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        rms_eps=text.number("rms_norm_eps"),
        rope=_resolve_rope(text),
        # LlavaConfig honours the flag in either place
        tied=top.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        bos=text.token_id("bos_token_id"),
        eos=text.token_id("eos_token_id"),
        pad=top.token_id("pad_token_id") if pad is None and top.reads("pad_token_id") else pad,
    )


def _resolve_rope(text: Section) -> dict[str, Any]:
    """Both spellings: transformers 5 puts `rope_theta` into `rope_parameters`, transformers 4 beside `rope_scaling`.

    Returns:
        `rope_type`, `rope_theta` and the parameters of that type, all present and positive.
    """
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    merged = {**text.mapping("rope_scaling"), **text.mapping("rope_parameters")}
    old_name = merged.pop("type", "default")
    kind = merged.pop("rope_type", old_name)
    theta = merged.pop("rope_theta", None)
    theta = text.get("rope_theta") if theta is None else theta
    rope = {**merged, "rope_theta": 10000.0 if theta is None else theta}
    if not isinstance(kind, str) or kind not in needed:
        raise unsupported(f"{text.where}: rope_type is {kind!r}, supported are {', '.join(needed)}")
    if set(merged) != set(needed[kind]):
        raise invalid(
            f"{text.where}: rope_type {kind!r} needs exactly ({', '.join(needed[kind])}), found {sorted(merged)}"
        )
    for key, value in rope.items():
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise invalid(f"{text.where}: the rope parameter {key} is {value!r}, a positive number is needed")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise invalid(f"{text.where}: low_freq_factor is not below high_freq_factor")
    return {"rope_type": kind, **{key: float(value) for key, value in rope.items()}}
