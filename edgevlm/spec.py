"""What a model *is*, resolved: the frozen description that a converter writes and the runtime obeys.

A family file (`edgevlm/families/`) declares where these numbers come from; the converter resolves it against a
checkpoint and stores the result in `bundle.json`; the runtime reads it back into the same dataclasses. Nothing in
here knows about files, tensors of a checkpoint, or native libraries.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from edgevlm.errors import BundleError

#: How a picture of any size becomes `height_px` x `width_px`:
#: `stretch` resizes without regard to the aspect ratio (SigLIP);
#: `shortest_crop` resizes the shorter side to `shortest_px`, then cuts the centre (CLIP, llava-hf);
#: `pad_square` pads to a square with `pad_rgb`, then as `shortest_crop` (the original LLaVA 1.5);
#: `tiles` resizes the longer side to `longest_px`, then both sides up to whole tiles, cuts them, and puts a tile of the
#: whole picture behind them (SmolVLM, Idefics3);
#: `longest_stretch` resizes the longer side to `longest_px`, then as `stretch` (the same, told not to split);
#: `slices` resizes to about as many pixels in the picture's own shape, with sides that are multiples of `multiple_px`,
#: and cuts a larger picture into up to `most_tiles` of such a size besides, all of one shape (MiniCPM-V).
ImagePolicy = Literal["stretch", "shortest_crop", "pad_square", "tiles", "longest_stretch", "slices"]
Resample = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


def _between(low: float, high: float) -> Any:
    """A field whose numbers (or whose tuple's numbers) lie in a range that the stages can work with."""
    return field(metadata={"range": (low, high)})


def _maybe_between(low: float, high: float) -> Any:
    """The same for a field that may be absent."""
    return field(default=None, metadata={"range": (low, high)})


def _rare(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field of a few models, written only where it differs from its default: other bundles stay as they are."""
    return field(default=default, metadata={"rare": True, **({} if low is None else {"range": (low, high)})})


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How pixels become the encoder's input, in the reference processor's own order of operations.

    The value fed is `(x * rescale - mean[c]) / std[c]` in float32 for a uint8 `x`.
    """

    policy: ImagePolicy
    height_px: int = _between(1, 4096)
    width_px: int = _between(1, 4096)
    shortest_px: int | None = _maybe_between(1, 8192)
    longest_px: int | None = _maybe_between(1, 8192)
    resample: Resample
    rescale: float = _between(1e-9, 1e9)
    mean: tuple[float, float, float] = _between(-1e9, 1e9)
    std: tuple[float, float, float] = _between(1e-9, 1e9)
    pad_rgb: tuple[int, int, int] | None = _maybe_between(0, 255)
    multiple_px: int | None = _rare(None, 1, 256)
    most_tiles: int | None = _rare(None, 1, 64)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Vision tower and connector, as one graph from `pixels_TCHW` (float32) to `embeds_TND` (float32).

    `n_tokens` embeddings of width `n_embd` come out for each tile; `layers` counts the blocks that really run. The
    connector `pixel_shuffle` joins `scale_factor` x `scale_factor` patches into each embedding; `resampler` asks
    `n_tokens` questions about all patches. The tower `siglip_strip` takes pictures of any whole number of patches.
    """

    tower: Literal["siglip", "siglip_strip", "clip"]
    connector: Literal["linear", "mlp", "pixel_shuffle", "resampler"]
    layers: int = _between(0, 512)
    hidden: int = _between(1, 65536)
    heads: int = _between(1, 1024)
    intermediate: int = _between(1, 1 << 20)
    patch_px: int = _between(1, 256)
    layer_norm_eps: float = _between(0, 1)
    activation: Activation
    post_norm: bool
    connector_activation: Activation
    n_tokens: int = _between(1, 1 << 16)
    n_embd: int = _between(1, 65536)
    scale_factor: int = field(default=1, metadata={"range": (1, 64)})


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """The language model's sizes, as far as anything outside the GGUF file needs them."""

    arch: Literal["llama"]
    layers: int = _between(1, 512)
    n_embd: int = _between(1, 65536)
    vocab: int = _between(1, 1 << 20)
    context_length: int = _between(1, 1 << 24)


@dataclass(frozen=True, kw_only=True)
class TileTexts:
    """What stands between the embeddings of a picture's tiles; control tokens in it count.

    First `grid_start`. For each tile of the grid, row by row: `tile`, in which `{row}` and `{column}` count from 1, its
    embeddings and `tile_end`; after each row `row_end`, and `between_rows` if another one follows; after all of them
    `grid_end`. Then `whole`, the embeddings of the whole picture, and `end`; with `whole_first` these three come before
    the grid, as their embeddings do. A picture that was not cut has only these.
    """

    tile: str
    row_end: str
    grid_end: str
    whole: str
    end: str
    grid_start: str = _rare("")
    tile_end: str = _rare("")
    between_rows: str = _rare("")
    whole_first: bool = _rare(False)


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Literals of the prompt. The chat template itself travels in the GGUF file.

    `image_token` is what the template prints where a picture goes; all of a picture's embeddings replace it, with
    `tile_texts` between them if the model was trained with such. A template that takes plain texts alone gets a
    message's parts as one text, image tokens included, with `between_parts` between them; without it, it gets parts.
    """

    image_token: str | None = None
    tile_texts: TileTexts | None = None
    between_parts: str | None = _rare(None)

    def placeholders(self) -> tuple[str, ...]:
        """Texts that stand for pictures and their tiles in a prompt, and have no place in an answer."""
        tiles = self.tile_texts
        if tiles is None:
            return (self.image_token,) if self.image_token else ()
        # no model has more than 64 tiles in a row (`ImageSpec.most_tiles`), and those that have names have 6
        places = [(row, column) for row in range(1, 7) for column in range(1, 7)]
        named = [tiles.tile.replace("{row}", str(row)).replace("{column}", str(column)) for row, column in places]
        rest = (tiles.grid_start, tiles.tile_end, tiles.row_end, tiles.grid_end, tiles.whole, tiles.end)
        return tuple(dict.fromkeys(text for text in (self.image_token or "", *named, *rest) if text))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One resolved model; one that knows text only has neither `image` nor `encoder` nor an image token."""

    name: str
    family: str
    image: ImageSpec | None = None
    encoder: EncoderSpec | None = None
    decoder: DecoderSpec
    prompt: PromptSpec


def to_json(spec: Any) -> dict[str, Any]:
    """A spec as plain JSON types, keys in declaration order, without rare fields that have their default."""
    kept = (f for f in dataclasses.fields(spec) if not (f.metadata.get("rare") and getattr(spec, f.name) == f.default))
    return {f.name: _plain(getattr(spec, f.name)) for f in kept}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


T = TypeVar("T")


def from_json(cls: type[T], data: Any, where: str = "spec") -> T:
    """Read a frozen dataclass back from JSON, strictly.

    Unknown keys, missing keys and values of another type are errors: a bundle must keep meaning what it meant.

    Args:
        cls: The dataclass to build, for example `ModelSpec`.
        data: What `json.load` returned.
        where: Path of `data` inside the document, for the message.

    Raises:
        BundleError: `bundle.invalid`, naming the place.
    """
    if not isinstance(data, dict):
        raise _invalid(where, f"an object is needed, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise _invalid(where, f"unknown field {', '.join(unknown)}")
    missing = sorted(n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING)
    if missing:
        raise _invalid(where, f"missing field {', '.join(missing)}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    for name, value in values.items():
        _check_range(fields[name].metadata.get("range"), value, f"{where}.{name}")
    return cls(**values)


def _check_range(limits: tuple[float, float] | None, value: Any, where: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if limits and number is not None and not limits[0] <= number <= limits[1]:
            raise _invalid(where, f"{number} is not between {limits[0]} and {limits[1]}")


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its annotation; the few shapes used by the specs are enough."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise _invalid(where, f"{value!r} is not one of {', '.join(map(str, args))}")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise _invalid(where, f"a list is needed, found {value!r:.80}")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _invalid(where, f"an object is needed, found {type(value).__name__}")
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint:
        return value
    raise _invalid(where, f"{getattr(hint, '__name__', hint)} is needed, found {value!r}")


def _invalid(where: str, what: str) -> BundleError:
    return BundleError(f"bundle.json: {where}: {what}; convert the checkpoint again", code="bundle.invalid")
