"""Which type of weights suits a device: `decoder_quant="auto"`.

Two things decide, both facts of llama.cpp: for which types it has repacked kernels on a CPU (`ggml-cpu/repack.cpp` of
the pinned version; a type without one loses more than half of its prefill speed), and whether a model's rows consist of
whole blocks of a type (a row that does not fit gets another type, and the replacements of K types have no such kernel).
Among what is equally fast, Q4_K_M loses least for its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm import llama
from edgevlm.converters import gguf_file
from edgevlm.converters.quant import RECIPES, Recipe
from edgevlm.errors import UsageError

THIS = "this"
_CANDIDATES = ("q4_k_m", "iq4_nl")  # best quality for the size first
_ENOUGH = 0.9  # of the weights must lie in rows that fit


@dataclass(frozen=True)
class Target:
    """A kind of CPU: how it is called in a sentence, and the types that it has repacked kernels for."""

    says: str
    repacked: frozenset[str]


_DOTPROD = frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL"})
_OTHER = Target("a CPU without repacked kernels", frozenset())
TARGETS = {
    "pi4": Target("a Raspberry Pi 4 (no dot product)", frozenset()),
    "pi5": Target("a Raspberry Pi 5 (dot product)", _DOTPROD),
    "apple": Target("Apple silicon (dot product)", _DOTPROD),
    "x86": Target("x86 with AVX2", frozenset({"Q4_0", "Q4_K", "IQ4_NL"})),
}
DEVICES = (THIS, *TARGETS)


@dataclass(frozen=True)
class Choice:
    """A recipe, and why, as one line."""

    recipe: Recipe
    reason: str


def check_device(device: str) -> None:
    """Refuse a device that is not known.

    Raises:
        UsageError: with the names.
    """
    if device not in DEVICES:
        raise UsageError(f"device is {device!r}, it must be one of {', '.join(DEVICES)}")


def choose(device: str, shapes: Mapping[str, tuple[int, ...]]) -> Choice:
    """The type of weights for a device and a model.

    Args:
        device: One of `DEVICES`.
        shapes: Shape of each matrix of the model, rows last.

    Raises:
        UsageError: the device is not known.
        DependencyError: this machine was meant, and llama.cpp is missing.
    """
    check_device(device)
    target = detect(llama.cpu_features()) if device == THIS else TARGETS[device]
    fitting = [RECIPES[name] for name in _CANDIDATES if _share(RECIPES[name].types[0], shapes) >= _ENOUGH]
    if not fitting:
        return Choice(RECIPES["f16"], "this model's rows fit no quantized type")
    fast = [recipe for recipe in fitting if recipe.types[0] in target.repacked]
    recipe = (fast or fitting)[0]
    kind = recipe.types[0]
    why = f"has repacked kernels for {kind}" if fast else "has repacked kernels for no type"
    others = "loses least for its size"
    if recipe.name != _CANDIDATES[0]:
        others = f"fits this model's rows, which are no multiples of {gguf_file.block_size('Q4_K')} as Q4_K needs"
    return Choice(recipe, f"{target.says} {why}, and {recipe.name} {others}")


def detect(features: frozenset[str]) -> Target:
    """The kind of CPU that llama.cpp was compiled for, from the features that it names."""
    if "REPACK" not in features:
        return _OTHER
    if "AVX2" in features:
        return TARGETS["x86"]
    if features & {"DOTPROD", "MATMUL_INT8"}:
        return Target("this Arm CPU (dot product)", _DOTPROD)
    return _OTHER


def _share(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """How many of the weights lie in rows that consist of whole blocks of a type, from 0 to 1."""
    block = gguf_file.block_size(kind)
    fitting = sum(math.prod(shape) for shape in shapes.values() if shape[-1] % block == 0)
    return fitting / sum(math.prod(shape) for shape in shapes.values())
