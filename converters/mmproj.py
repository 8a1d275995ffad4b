"""A llama.cpp `mmproj` file, which holds vision tower and connector, as a source of the encoder.

The file is read as the Hugging Face model that it was made from, not as llama.cpp's graph runs it: for LLaVA that graph
drops one block too many, shifts the positions by one and takes the other GELU. What the converters of llama.cpp changed
is undone here: names, `fc1` and `fc2` exchanged, Q, K and V in one tensor, leading axes of one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import families
from edgevlm.converters import gguf_file
from edgevlm.converters.gguf_file import StoredTensor
from edgevlm.converters.mapping import listed, wanted_leaves
from edgevlm.converters.resolve import ResolvedVision, resolve_vision, vision_sizes
from edgevlm.converters.resolve_image import triple
from edgevlm.converters.sections import Section, invalid, unsupported
from edgevlm.errors import CheckpointError
from edgevlm.families.mmproj import KEYS, TENSORS
from edgevlm.families.schema import Family, Mmproj, Processor, Weight
from edgevlm.gguf import GGUFHeader, read_container

_ARRAYS = frozenset(
    f"clip.vision.{name}" for name in ("image_mean", "image_std", "feature_layer", "image_grid_pinpoints")
)
_BLOCK = re.compile(r"v\.blk\.(0|[1-9][0-9]{0,3})\.(.+)")
_MOST_BLOCKS, _LONGEST_SIDE, _LARGEST_WIDTH, _MOST_HEADS = 512, 4096, 65536, 1024
#: `preproc_image_size` in files older than the key, in tiles: so all released models have it.
_TILES_ALONG_THE_LONGER_SIDE = 4


@dataclass(frozen=True, kw_only=True)
class Projector:
    """An mmproj file that has been understood.

    Attributes:
        family: Whose tower and connector these are.
        vision: All numbers.
        tower, connector: Tensors by our own names.
        unused: Names of tensors that never reach the output.
        notes: What was corrected or assumed, one sentence each.
    """

    family: Family
    vision: ResolvedVision
    tower: Mapping[str, StoredTensor]
    connector: Mapping[str, StoredTensor]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def read_mmproj(path: Path, *, n_embd: int, known_families: tuple[Family, ...] | None = None) -> Projector:
    """Read an mmproj file; its weights stay on the disk.

    Args:
        path: The file.
        n_embd: Width of the embeddings that the text model takes.
        known_families: Families to choose from; every one by default.

    Raises:
        FileError: the file does not exist or cannot be read.
        GGUFError: it breaks the format.
        CheckpointError: it is no mmproj, or not one that can be run, or belongs to another text model.
    """
    header = read_container(path, _ARRAYS)
    _check_kind(header)
    tensors = gguf_file.map_tensors(header)
    family, declared = families.find_mmproj(_projector_type(header), tensors, known_families)
    raw = Section(path.name, _clip_keys(header), KEYS, declared.keys)
    hidden = raw.size("clip.vision.embedding_length", _LARGEST_WIDTH)
    tensors, intermediate = _modern(path.name, tensors, hidden)
    blocks = _count_blocks(raw, tensors)
    tower, notes = _tower_config(raw, declared, hidden=hidden, intermediate=intermediate, blocks=blocks)
    processor, processor_notes = _processor_settings(raw, declared.processor)
    assert family.vision is not None
    config = _top_config(raw, declared, family, _selected_state(raw, declared, tensors, blocks, hidden))
    inside, apart = ({}, tower) if family.vision.separate else ({family.vision.section: tower}, None)
    top = Section(path.name, config | inside, family.keys, family.vision.connector.keys)
    _check_width(path.name, declared, tensors, n_embd)
    vision = resolve_vision(family, top, processor, apart, n_embd=n_embd)
    left = dict(tensors)
    sizes = vision_sizes(vision) | {"n_embd": n_embd}
    named = {TENSORS[weight.to]: weight for weight in declared.tower.weights.values()}
    return Projector(
        family=family,
        vision=vision,
        tower=_take(path.name, named, vision.encoder.layers, sizes, left),
        connector=_take(path.name, _connector_names(declared, tensors), 0, sizes, left),
        unused=_unused(
            path.name, left, declared, [name for name in named if "{i}" in name], range(vision.encoder.layers, blocks)
        ),
        notes=(*notes, *processor_notes, *([declared.assumes] if declared.assumes else [])),
    )


def values(tensor: StoredTensor) -> NDArray[np.float32]:
    """A copy of a tensor as float32 in its shape, finite.

    Raises:
        CheckpointError: `checkpoint.invalid` for NaN or infinity.
    """
    with np.errstate(all="ignore"):  # a scale may be infinite; what comes of it is looked at
        found = np.array(gguf_file.values(tensor), np.float32).reshape(tensor.shape)
    if not np.isfinite(found).all():
        raise invalid(f"{tensor.name} holds NaN or infinity")
    return found


def _check_kind(header: GGUFHeader) -> None:
    arch, kind = header.metadata.get("general.architecture"), header.metadata.get("general.type", "mmproj")
    if arch != "clip" or kind != "mmproj":
        raise unsupported(
            f"{header.path} is no mmproj file: it is a {str(kind)[:40]!r} of the architecture {str(arch)[:40]!r}; give "
            "the text model first and the mmproj after --mmproj"
        )


def _projector_type(header: GGUFHeader) -> str:
    """The second key is for files that hold an audio encoder as well."""
    said = [header.metadata.get(f"clip.{key}projector_type") for key in ("", "vision.")]
    found = {str(one) for one in said if one is not None}
    if len(found) > 1:
        raise invalid(f"{header.path.name} names two projectors, {' and '.join(sorted(found))}")
    return found.pop() if found else "(none)"


def _clip_keys(header: GGUFHeader) -> dict[str, Any]:
    """What the file says of the model; `general` says where it comes from, `quantize` how it was made smaller.

    None stands for a list where none is read; to a `Section` that would be as good as no key.
    """
    return {
        key: "(a list)" if value is None else list(value) if isinstance(value, tuple) else value
        for key, value in header.metadata.items()
        if not key.startswith(("general.", "quantize."))
    }


def _modern(where: str, tensors: Mapping[str, StoredTensor], hidden: int) -> tuple[dict[str, StoredTensor], int]:
    """The tensors under the names of new files, and the width inside the blocks.

    Old converters call `fc1` `ffn_down` and `fc2` `ffn_up`. `fc1` is the one with inputs of the tower's width; the
    first block decides, and the shapes of all others are checked later.
    """
    parts = list(_split_qkv(tensors, hidden))
    renamed = dict(parts)
    if len(renamed) != len(parts):
        raise invalid(f"{where} has Q, K or V of a block twice, joined and alone")
    up = renamed.get("v.blk.0.ffn_up.weight")
    if up is None or len(up.shape) != 2 or hidden not in up.shape:
        found = "is missing" if up is None else f"has the shape {list(up.shape)}"
        raise CheckpointError(
            f"{where}: v.blk.0.ffn_up.weight {found}, a matrix with a side of {hidden} is needed; download it again",
            code="checkpoint.missing_tensor" if up is None else "checkpoint.shape",
        )
    if up.shape == (hidden, hidden):
        raise unsupported(f"{where}: the blocks are as wide inside as outside ({hidden}), so fc1 and fc2 look alike")
    if up.shape[1] == hidden:
        return renamed, up.shape[0]
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    swapped = {re.sub(r"(?<=\.)(ffn_up|ffn_down)(?=\.)", lambda m: other[m[1]], name): name for name in renamed}
    return {new: renamed[old] for new, old in swapped.items()}, up.shape[1]


def _split_qkv(tensors: Mapping[str, StoredTensor], hidden: int) -> Iterator[tuple[str, StoredTensor]]:
    """Three equal parts in the place of each tensor that joins Q, K and V."""
    for name, tensor in tensors.items():
        if ".attn_qkv." not in name or tensor.shape[0] != 3 * hidden:
            yield name, tensor
            continue
        shape = (hidden, *tensor.shape[1:])
        # Bytes or numbers, rows or not: blocks have powers of two of weights, so a third of whole blocks is whole, too.
        for part, bits in zip("qkv", np.split(tensor.bits, 3), strict=True):
            yield (
                name.replace("attn_qkv", f"attn_{part}"),
                dataclasses.replace(tensor, shape=shape, nbytes=bits.nbytes, bits=bits),
            )


def _count_blocks(raw: Section, tensors: Mapping[str, StoredTensor]) -> int:
    said = raw.size("clip.vision.block_count", _MOST_BLOCKS)
    found = {int(match[1]) for name in tensors if (match := _BLOCK.fullmatch(name))}
    if found != set(range(said)):
        raise invalid(f"{raw.where} says block_count {said}, its tensors are of {len(found)} blocks")
    return said


def _tower_config(
    raw: Section, declared: Mmproj, *, hidden: int, intermediate: int, blocks: int
) -> tuple[dict[str, Any], list[str]]:
    """The tower's section of config.json as the original had it, and what was corrected."""
    heads = raw.size("clip.vision.attention.head_count", _MOST_HEADS)
    for key, wanted in (
        ("clip.vision.attention.head_count_kv", (heads,)),
        ("clip.vision.attention.head_dim", (hidden // heads,)),
        ("clip.vision.feed_forward_length", (intermediate, 0)),  # 0 in some old files
    ):
        said = raw.get(key)
        if said is not None and (type(said) is not int or said not in wanted):
            raise invalid(f"{raw.where} says {key} {str(said)[:40]}, the other numbers ask for {wanted[0]}")
    notes = []
    epsilon = raw.number("clip.vision.attention.layer_norm_epsilon")
    if epsilon >= 1:
        raise invalid(f"{raw.where} says layer_norm_epsilon {epsilon:.3g}, a number below 1 is needed")
    if abs(epsilon - declared.layer_norm_eps) > 1e-3 * declared.layer_norm_eps:
        notes.append(f"the mmproj says layer_norm_epsilon {epsilon:.3g}, the tower has {declared.layer_norm_eps:.3g}")
    if raw.flag("clip.use_silu"):
        raise unsupported(f"{raw.where} says clip.use_silu, which no supported tower has")
    activation = "use_gelu" if raw.flag("clip.use_gelu") else ""
    if activation not in declared.activations:
        raise unsupported(f"{raw.where}: a {declared.projector} tower without clip.use_gelu is not known")
    return {
        "model_type": declared.tower.model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": raw.size("clip.vision.image_size", _LONGEST_SIDE),
        "patch_size": raw.size("clip.vision.patch_size", _LONGEST_SIDE),
        "layer_norm_eps": declared.layer_norm_eps,
        "hidden_act": declared.activations[activation],
    }, notes


def _selected_state(
    raw: Section, declared: Mmproj, tensors: Mapping[str, StoredTensor], blocks: int, hidden: int
) -> int:
    """How many blocks run."""
    said = raw.get("clip.vision.feature_layer") if raw.reads("clip.vision.feature_layer") else None
    if said is None:
        kept = "v.post_ln.weight" in tensors or declared.whole_tower.get(hidden) == blocks
        return blocks - 1 if declared.drops_last and kept else blocks
    if not isinstance(said, list) or not all(type(index) is int for index in said):
        raise invalid(f"{raw.where}: clip.vision.feature_layer is {str(said)[:80]}, whole numbers are needed")
    if len(said) != 1:
        raise unsupported(f"{raw.where}: feature_layer joins {len(said)} states, only one state can be used")
    if not 0 <= said[0] <= blocks:
        raise invalid(f"{raw.where}: feature_layer is {said[0]}, the tower has the states 0 to {blocks}")
    return int(said[0])


def _top_config(raw: Section, declared: Mmproj, family: Family, state: int) -> dict[str, Any]:
    """The top level of config.json as the original had it, as far as tower and connector need it."""
    vision = family.vision
    assert vision is not None
    config = dict(declared.config)
    if isinstance(vision.feature_layer, str):
        config[vision.feature_layer] = state
    config |= {ours: raw.get(key) for ours, key in declared.config_keys.items() if raw.get(key) is not None}
    return config


def _processor_settings(raw: Section, processor: Processor) -> tuple[dict[str, Any], list[str]]:
    """preprocessor_config.json as the original had it, and what was assumed."""
    side = raw.size("clip.vision.image_size", _LONGEST_SIDE)
    settings: dict[str, Any] = {"image_processor_type": processor.names[0]}
    for ours, key in (("image_mean", "clip.vision.image_mean"), ("image_std", "clip.vision.image_std")):
        found, usual = np.array(triple(raw, key), np.float32), processor.keys.read[ours]
        # the decimals of the original, which the file rounded; the runtime rounds them in the same way
        settings[ours] = usual if np.array_equal(found, np.float32(usual)) else [float(str(one)) for one in found]
    square = {"height": side, "width": side}
    if not processor.tiles:
        crops = "shortest_edge" in processor.keys.read["size"]
        return settings | ({"size": {"shortest_edge": side}, "crop_size": square} if crops else {"size": square}), []
    notes = []
    if raw.get("clip.vision.preproc_image_size") is None:
        longest = _TILES_ALONG_THE_LONGER_SIDE * side
        notes.append(f"the mmproj does not say preproc_image_size; pictures become {longest} pixels long")
    else:
        longest = raw.size("clip.vision.preproc_image_size", 2 * _LONGEST_SIDE)
    return settings | {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}}, notes


def _connector_names(declared: Mmproj, tensors: Mapping[str, StoredTensor]) -> dict[str, Weight]:
    """The connector's declarations by the names that this file uses."""
    leaves = declared.connector.weights
    prefix = max(declared.connector_prefixes, key=lambda prefix: sum(prefix + leaf in tensors for leaf in leaves))
    return {prefix + leaf: weight for leaf, weight in leaves.items()}


def _check_width(where: str, declared: Mmproj, tensors: Mapping[str, StoredTensor], n_embd: int) -> None:
    """Whether the connector's last matrix gives what the text model takes."""
    names = [name for name, weight in _connector_names(declared, tensors).items() if len(weight.shape) == 2]
    last = tensors.get(names[-1])
    if last is not None and last.shape[0] != n_embd:
        raise CheckpointError(
            f"{where} gives embeddings of width {last.shape[0]}, the text model takes {n_embd}: they are no pair; "
            "give the mmproj that was made with this text model",
            code="checkpoint.shape",
        )


def _take(
    where: str, weights: Mapping[str, Weight], blocks: int, sizes: Mapping[str, int], left: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Take the wanted tensors out of `left`: by our own names, in the declared shapes."""
    wanted = wanted_leaves(weights, blocks, sizes)
    missing = [name for name in wanted if name not in left]
    if missing:
        raise CheckpointError(f"{where} lacks {listed(missing)}; download it again", code="checkpoint.missing_tensor")
    found = {}
    for name, (ours, weight) in wanted.items():
        tensor, shape = left.pop(name), tuple(sizes[size] for size in weight.shape)
        if _squeezed(tensor.shape) != _squeezed(shape):
            raise CheckpointError(
                f"{where}: {name} has the shape {list(tensor.shape)}, the other numbers ask for {list(shape)} "
                f"({' x '.join(weight.shape)})",
                code="checkpoint.shape",
            )
        found[ours] = dataclasses.replace(tensor, shape=shape)
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading axes of one, which GGUF does not keep."""
    ones = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[ones:]


def _unused(
    where: str, left: Mapping[str, StoredTensor], declared: Mmproj, of_blocks: list[str], idle: range
) -> tuple[str, ...]:
    """What is left, if it is known: what the family says, and blocks behind the selected state."""
    known = {name.replace("{i}", str(i)) for name in of_blocks for i in idle}
    unexpected = sorted(
        name
        for name in left
        if name not in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in declared.unused)
    )
    if unexpected:
        raise CheckpointError(
            f"{where} has tensors that this projector does not use: {listed(unexpected)}",
            code="checkpoint.unexpected_tensor",
        )
    return tuple(sorted(left))
