"""The words in which a family is declared: where each number and each tensor of a checkpoint comes from.

A family file holds literals of these classes and nothing else. `converters/resolve.py` reads the numbers,
`converters/mapping.py` the tensors; the runtime never sees a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgevlm.spec import TileTexts


class _Required:
    """The type of `REQUIRED`, the default of a key that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Which keys of one section of a JSON file matter. A key that is listed nowhere is an error.

    Attributes:
        read: Keys that the converter reads, with the default of the Hugging Face class or `REQUIRED`.
        fixed: Keys that change the mathematics, with the values that we can run (the first is the default).
        ignored: Keys without influence on inference.
    """

    read: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weight:
    """One tensor, or one for each block when the names hold `{i}`.

    Attributes:
        to: Name inside edgevlm: of the GGUF tensor for a decoder, of the graph's weight for an encoder.
        shape: Names of sizes, outermost axis first (see `converters/resolve.py`, `sizes`).
        transform: A name from `converters/transforms.py`, colon, the size that it takes; empty for none.
        when: The size that must be true (not 0) for this tensor to exist; empty for always.
    """

    to: str
    shape: tuple[str, ...]
    transform: str = ""
    when: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component: its section of config.json and its tensors.

    Attributes:
        kind: What builds it: a name registered in `converters/onnx_vision.py`, or a GGUF architecture.
        keys: Keys of its section of config.json.
        weights: Leaf name in the checkpoint (without the family's prefix) -> what it is.
        unused: Leaf patterns (`*` matches anything) that never reach the output.
    """

    kind: str
    keys: Keys
    weights: Mapping[str, Weight]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tower(Part):
    """A vision tower. `model_type` is what `vision_config.model_type` says; `class_token` is 1 if one leads.

    `aliases` are further values of `model_type`, for families that never ask it; an empty one stands for no such key.
    """

    model_type: str
    class_token: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Processor:
    """An image processor class of Hugging Face.

    Attributes:
        names: Class names, without the suffixes `Fast` and `Pil`.
        pads: Whether it honours `do_pad` (to a square, in the mean colour).
        tiles: Whether it cuts pictures into tiles of `max_image_size`, unless `do_image_splitting` is false.
        keys: Keys of preprocessor_config.json; `read` holds the class's defaults.
    """

    names: tuple[str, ...]
    pads: bool = False
    tiles: bool = False
    keys: Keys


@dataclass(frozen=True, kw_only=True)
class Vision:
    """What a vision-language family puts before its decoder.

    Attributes:
        section: Name of the tower's section in config.json.
        towers, processors: The alternatives; the checkpoint says which one it has.
        tower_prefixes, connector_prefixes: Spellings of the same component in different releases of transformers; a
            checkpoint uses one of each.
        feature_layer: The key that selects the hidden state (an index into all states, the first being the input of
            block 0, negative from the end), or a literal index.
        feature_strategy: The key that says `default` (the first position is cut off) or `full`, or such a literal.
        post_norm: Whether the tower's last norm follows the selected state.
        image_token: Keys, in order of preference, of the id of the token that stands for a picture; none if no token
            does, and templates print `<image>`.
        tile_texts: What stands between the tiles of a picture; None if nothing does.
        control_tokens: Texts in `tile_texts` that must be tokens of their own.
        separate: Whether the tower lies in a checkpoint of its own; `section` is then a section of its config.json,
            which may also be flat, and the tower's prefixes begin with `tower:`.
        aspect: The key that says how a picture becomes square (`pad`, or `square`, the default); empty for none.
        wrap: The key that says whether two tokens stand around a picture, and those tokens.
        slices: The key of config.json that says into how many slices a picture is cut; the image processor's file may
            then be missing. Empty for none.
        slice_keys: Keys of that section.
        between_parts: What joins pictures and text of a message, for chat templates that take plain texts alone.
    """

    section: str
    processors: tuple[Processor, ...]
    towers: tuple[Tower, ...]
    tower_prefixes: tuple[str, ...]
    connector: Part
    connector_prefixes: tuple[str, ...]
    feature_layer: str | int
    feature_strategy: str | Literal["default", "full"]
    post_norm: bool = False
    image_token: tuple[str, ...]
    tile_texts: TileTexts | None = None
    control_tokens: tuple[str, ...] = ()
    separate: bool = False
    aspect: str = ""
    wrap: tuple[str, str, str] | None = None
    slices: str = ""
    slice_keys: Keys = Keys()
    between_parts: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mmproj:
    """How llama.cpp's `mmproj` files hold a family's tower and connector.

    Of several for one `projector`, the class token and the connector's tensors decide.

    Attributes:
        projector: Value of `clip.projector_type`.
        tower: What the tensors named in `families/mmproj.py` make.
        connector, connector_prefixes: The same connector as the family's, under the names in such a file.
        processor: The image processor that the model was trained with; the file gives sizes, mean and deviation.
        layer_norm_eps: The tower's own; converters have written others.
        activations: What the file says (`use_gelu`, or nothing: an empty text) -> the tower's `hidden_act`.
        keys: Keys of the file beside those that every one may have.
        config: What config.json says in this family, where such a file is silent.
        config_keys: Key of config.json -> key of the file, which counts if it is there.
        drops_last: Whether the tower's last block is of no use; most converters leave it out, some keep it.
        whole_tower: Blocks of towers by their width, to know those that were kept.
        unused: Patterns (`*` matches anything) of tensors that never reach the output.
        assumes: What the file does not say and this declaration decides, for the user to know; empty for nothing.
    """

    projector: str
    tower: Tower
    connector: Part
    connector_prefixes: tuple[str, ...]
    processor: Processor
    layer_norm_eps: float
    activations: Mapping[str, str]
    keys: Keys = Keys()
    config: Mapping[str, Any] = field(default_factory=dict)
    config_keys: Mapping[str, str] = field(default_factory=dict)
    drops_last: bool = False
    whole_tower: Mapping[int, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    assumes: str = ""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template. It fits a vocabulary that has `token`, or any if that is empty; `name` asks for it."""

    name: str
    source: str
    token: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose model a family is, as published research and its makers say, whatever a checkpoint's own files claim.

    `notice` is told while converting and kept in the bundle.
    """

    model: str
    repository: str
    notice: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model that somebody published, as far as `docs/models.md` needs it; a conversion never looks here.

    Attributes:
        name: As people call it.
        repositories: Where it is, the first of them the one that `config` was read from.
        licence: In a few words, with what it asks of whoever passes the model on.
        layouts: In which forms its weights come.
        config, processor: What its config.json and its image processor's settings say about sizes.
        tower: The same of the tower's own config.json, where the tower lies apart.
        tied: Whether the checkpoint stores no head of its own.
    """

    name: str
    repositories: tuple[str, ...]
    licence: str
    layouts: tuple[str, ...] = ("safetensors",)
    config: Mapping[str, Any]
    processor: Mapping[str, Any] | None = None
    tower: Mapping[str, Any] | None = None
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: which parts it joins, and under which names.

    Attributes:
        hf_architectures: Values of `architectures` in config.json, or names of the model's class in `auto_map`.
        keys: Top-level keys of config.json; with `text_section` None those that are not the decoder's.
        text_section: Name of the decoder's section; None if its keys are config.json's own.
        text_keys: Keys of that section beyond those of `decoder`.
        decoder_prefixes, head_prefixes: As a tower's.
        decoder_model_types: Values of `model_type` beside the decoder's keys.
        needs: Keys of config.json that must be there, with the values that they may have (None is an absent key; no
            values mean any). Of several families for an architecture, the one with the most needs wins.
        templates: For checkpoints without a chat template, the first that fits.
        vision: None for a family that knows text only.
        origin: None where the checkpoint's own files are all that is known.
        mmproj: For files of llama.cpp that hold tower and connector, beside a text model that is a file of its own.
        title: The headline in `docs/models.md`.
        published: Models of this family, for the same page.
    """

    name: str
    hf_architectures: tuple[str, ...]
    keys: Keys
    text_section: str | None
    text_keys: Keys = Keys()
    decoder: Part
    decoder_prefixes: tuple[str, ...]
    head_prefixes: tuple[str, ...]
    decoder_model_types: tuple[str, ...] = ("llama",)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    templates: tuple[Template, ...] = ()
    vision: Vision | None = None
    origin: Origin | None = None
    mmproj: tuple[Mmproj, ...] = ()
    title: str = ""
    published: tuple[Published, ...] = ()
