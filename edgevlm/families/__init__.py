"""The model families that can be converted: one module each, found by the architecture name in config.json."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from edgevlm.errors import CheckpointError
from edgevlm.families.schema import Family, Mmproj

_NOT_FAMILIES = {"schema", "parts", "published", "templates", "mmproj"}


def module_names() -> tuple[str, ...]:
    """Names of the family modules, sorted."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _NOT_FAMILIES))


def families() -> tuple[Family, ...]:
    """Every declared family, in the order of its module's name."""
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in module_names())


def find(
    architectures: list[str], known: tuple[Family, ...] | None = None, config: Mapping[str, Any] | None = None
) -> Family:
    """The family that declares one of these Hugging Face architectures.

    Args:
        architectures: The list `architectures` of config.json.
        known: The families to search; every declared one by default.
        config: config.json, for families that need more than an architecture.

    Raises:
        CheckpointError: `checkpoint.unsupported`, listing what is supported.
    """
    known = families() if known is None else known
    fitting = [
        family
        for family in known
        if any(name in family.hf_architectures for name in architectures) and _has(config or {}, family.needs)
    ]
    if fitting:
        return max(fitting, key=lambda family: len(family.needs))
    supported = sorted({name for family in known for name in family.hf_architectures})
    raise CheckpointError(
        f"config.json names the architecture {', '.join(architectures) or '(none)'}{_projector(config or {})}; "
        f"supported are {', '.join(supported)}",
        code="checkpoint.unsupported",
    )


def find_mmproj(
    projector: str, tensors: Collection[str], known: tuple[Family, ...] | None = None
) -> tuple[Family, Mmproj]:
    """The family whose tower and connector a llama.cpp `mmproj` file holds, and its declaration of such files.

    Args:
        projector: What the file says as `clip.projector_type`.
        tensors: Names of its tensors.
        known: The families to search; every declared one by default.

    Raises:
        CheckpointError: `checkpoint.unsupported`, listing what is supported.
    """
    declared = [(family, one) for family in (families() if known is None else known) for one in family.mmproj]
    class_token = int("v.class_embd" in tensors)
    fitting = [pair for pair in declared if (pair[1].projector, pair[1].tower.class_token) == (projector, class_token)]
    if fitting:
        return max(fitting, key=lambda pair: _overlap(pair[1], tensors))
    supported = sorted({one.projector for _, one in declared})
    tower = f" behind a tower with{'' if class_token else 'out'} a class token" if projector in supported else ""
    raise CheckpointError(
        f"the mmproj has the projector {projector[:40]!r}{tower}; supported are {', '.join(supported)}",
        code="checkpoint.unsupported",
    )


def _overlap(declared: Mmproj, tensors: Collection[str]) -> tuple[int, int]:
    """How well a file has the tensors of a connector: those that are there, less those that are not."""
    found = max(sum(prefix + leaf in tensors for leaf in declared.connector.weights)
                for prefix in declared.connector_prefixes)  # fmt: skip
    return 2 * found - len(declared.connector.weights), found


def _has(config: Mapping[str, Any], needs: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(config.get(key) in values if values else key in config for key, values in needs.items())


def _projector(config: Mapping[str, Any]) -> str:
    found = config.get("mm_projector_type")
    return "" if found is None else f" with mm_projector_type {str(found)[:40]!r}"
