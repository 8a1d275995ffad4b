"""Which checkpoint tensor becomes what: every tensor is used once, declared unused, or named in an error.

Names are compared whole, never by substring, so that a new tensor cannot slip in under an old rule.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.converters.resolve import Resolved
from edgevlm.converters.safetensors import Tensor
from edgevlm.errors import CheckpointError
from edgevlm.families.schema import Family, Part, Weight

_SHOWN = 5  # names listed in an error


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        tensor: The checkpoint's tensor, of the declared shape.
        transform: Name of a transform, empty for none.
        argument: The number that the transform takes.
    """

    tensor: Tensor
    transform: str = ""
    argument: int = 0


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Sources by our own names, in the family's order; `head` is None when the checkpoint stores none.

    `tower` and `connector` are empty for a family that knows text only.
    """

    tower: Mapping[str, Source]
    connector: Mapping[str, Source]
    decoder: Mapping[str, Source]
    head: Source | None
    unused: tuple[str, ...]


def map_tensors(family: Family, resolved: Resolved, tensors: Mapping[str, Tensor]) -> Mapped:
    """Assign every tensor of a checkpoint.

    Raises:
        CheckpointError: `checkpoint.missing_tensor`, `checkpoint.unexpected_tensor` or `checkpoint.shape`.
    """
    left = dict(tensors)
    sizes = resolved.sizes

    def take(part: Part, prefixes: tuple[str, ...], blocks: int) -> dict[str, Source]:
        wanted = wanted_leaves(part.weights, blocks, sizes)
        prefix = _spelling(prefixes, wanted, left)
        missing = [prefix + leaf for leaf in wanted if prefix + leaf not in left]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {listed(missing)}; download it again or check config.json",
                code="checkpoint.missing_tensor",
            )
        return {name: _source(left.pop(prefix + leaf), weight, sizes) for leaf, (name, weight) in wanted.items()}

    tower: Mapping[str, Source] = {}
    connector: Mapping[str, Source] = {}
    if family.vision and resolved.vision:
        tower = take(resolved.vision.tower, family.vision.tower_prefixes, resolved.vision.encoder.layers)
        connector = take(family.vision.connector, family.vision.connector_prefixes, 0)
    decoder = take(family.decoder, family.decoder_prefixes, resolved.spec.decoder.layers)
    head = _take_head(family, resolved, left)
    unused = _unused(family, resolved, left)
    unexpected = sorted(set(left) - set(unused))
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has tensors that the family {family.name} does not use: {listed(unexpected)}",
            code="checkpoint.unexpected_tensor",
        )
    return Mapped(tower=tower, connector=connector, decoder=decoder, head=head, unused=unused)


def wanted_leaves(
    weights: Mapping[str, Weight], blocks: int, sizes: Mapping[str, int]
) -> dict[str, tuple[str, Weight]]:
    """Leaf in the checkpoint -> (our name, declaration), once for each block where the leaf has `{i}`."""
    found = {}
    for leaf, weight in weights.items():
        if weight.when and not sizes[weight.when]:
            continue
        for i in range(blocks) if "{i}" in leaf else (None,):
            found[leaf.replace("{i}", str(i))] = (weight.to.replace("{i}", str(i)), weight)
    return found


def _spelling(prefixes: tuple[str, ...], wanted: Mapping[str, object], left: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the wanted leaves exist; a complete part always wins, a tie takes the first."""
    return max(prefixes, key=lambda prefix: sum(prefix + leaf in left for leaf in wanted))


def _source(tensor: Tensor, weight: Weight, sizes: Mapping[str, int]) -> Source:
    shape = tuple(sizes[size] for size in weight.shape)
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.name} has the shape {list(tensor.shape)}, config.json asks for {list(shape)} "
            f"({' x '.join(weight.shape)})",
            code="checkpoint.shape",
        )
    if not tensor.usable:
        raise CheckpointError(
            f"{tensor.name} has the type {tensor.dtype}; weights must be F32, F16 or BF16",
            code="checkpoint.unsupported",
        )
    transform, _, argument = weight.transform.partition(":")
    return Source(tensor, transform, sizes[argument] if argument else 0)


def _take_head(family: Family, resolved: Resolved, left: dict[str, Tensor]) -> Source | None:
    """The output matrix, None if config.json ties it and none is stored."""
    names = [prefix + "weight" for prefix in family.head_prefixes if prefix + "weight" in left]
    if not names and resolved.llama.tied:
        return None
    if not names:
        raise CheckpointError(
            f"the checkpoint lacks {family.head_prefixes[0]}weight and config.json does not tie it to the embedding",
            code="checkpoint.missing_tensor",
        )
    return _source(left.pop(names[0]), Weight("output.weight", ("vocab", "n_embd")), resolved.sizes)


def _unused(family: Family, resolved: Resolved, left: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Tensors that the family declares unused, and blocks behind the selected state."""
    parts = [(family.decoder_prefixes, family.decoder.unused)]
    if family.vision and resolved.vision:
        vision = resolved.vision
        blocks = range(vision.encoder.layers, vision.tower_layers)
        idle = tuple(leaf.replace("{i}", str(i)) for leaf in vision.tower.weights if "{i}" in leaf for i in blocks)
        parts.append((family.vision.tower_prefixes, (*vision.tower.unused, *idle)))
        parts.append((family.vision.connector_prefixes, family.vision.connector.unused))
    return tuple(
        sorted(
            name
            for name in left
            if any(
                name.startswith(prefix) and _matches(name.removeprefix(prefix), patterns)
                for prefixes, patterns in parts
                for prefix in prefixes
            )
        )
    )


def _matches(leaf: str, patterns: tuple[str, ...]) -> bool:
    general = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", leaf)
    return leaf in patterns or any(fnmatch.fnmatchcase(general, pattern) for pattern in patterns)


def listed(names: list[str]) -> str:
    """Names for an error: the first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
