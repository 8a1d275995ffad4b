"""How much a conversion may cost before it is refused, and what to choose instead.

The limits come from measurement. The built-in model (trained, 4 blocks of width 256) loses 0.0003 nats as q8_0, 0.005
as q4_k_m, 0.025 as q4_0, 0.06 with all matrices in 3 bits and 0.28 in 2 bits, where every tenth first choice is
another. Two blocks of random weights, which have no redundancy, lose 0.1 as q4_0 and 0.3 to 0.8 in 3 and 2 bits.
Encoders of random weights keep a cosine of 0.9995 on average and 0.9992 at worst as int8, and of INT4 as int4, which
is for boards that have no memory for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.converters.quant import RECIPES

KL_MEAN = 0.3  # nats
TOP1_AGREEMENT = 0.8
#: Below this divergence hardly any probability moved, and the likeliest token only changes where a model is undecided:
#: random weights give flat distributions, of which q4_0 turns half of the first places around at 0.11 nats.
TOP1_MATTERS_FROM = 0.15  # nats
#: Mean and minimum over the tokens, by the encoder's form.
COSINES = {"fp16": (0.99999, 0.9999), "int8": (0.999, 0.99), "int4": (0.95, 0.9)}
_BETTER_FORMS = {"int4": "int8", "int8": "fp16", "fp16": "fp32"}


def exceeded(fidelity: Mapping[str, Any], decoder_quant: str, encoder_quant: str) -> list[str]:
    """Sentences for what passes a limit, each with the figures and a better choice; empty if nothing does.

    Args:
        fidelity: The section of the manifest.
        decoder_quant: The recipe that was used.
        encoder_quant: The encoder's.
    """
    found = []
    cost = fidelity["decoder"].get("predictions")
    if cost and (
        cost["kl_mean"] > KL_MEAN or (cost["top1_agreement"] < TOP1_AGREEMENT and cost["kl_mean"] > TOP1_MATTERS_FROM)
    ):
        found.append(
            f"the decoder as {decoder_quant} predicts other words than the checkpoint (KL divergence "
            f"{cost['kl_mean']:.3g}, at most {KL_MEAN}; same first choice {cost['top1_agreement']:.1%}, at least "
            f"{TOP1_AGREEMENT:.0%}): {_better(decoder_quant)}"
        )
    cost = fidelity.get("encoder", {})
    if not encoder_is_good(cost, encoder_quant):
        mean, least = COSINES[encoder_quant]
        found.append(
            f"the encoder as {encoder_quant} sees other things than the checkpoint (cosine {cost['cosine_mean']} on "
            f"average, at least {mean}; {cost['cosine_min']} at worst, at least {least}): "
            f"try encoder_quant {_BETTER_FORMS[encoder_quant]}"
        )
    return found


def encoder_is_good(cost: Mapping[str, Any], quant: str) -> bool:
    """Whether an encoder is within its limits; float32 has none, nor has a model without an encoder."""
    mean, least = COSINES.get(quant, (-1, -1))
    return cost.get("cosine_mean", 1) >= mean and cost.get("cosine_min", 1) >= least  # type: ignore[no-any-return]


def _better(decoder_quant: str) -> str:
    """The next recipe with more bits; of the last one only its single types can be the cause."""
    bits = RECIPES[decoder_quant].bits
    more = [recipe for recipe in RECIPES.values() if recipe.bits >= bits + 0.5 and not recipe.direct]
    if not more:
        return "check the types chosen for single matrices"
    return f"try {min(more, key=lambda recipe: recipe.bits).name}, or more precise types for single matrices"
