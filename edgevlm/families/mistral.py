"""Mistral 7B, text only: Llama's tensors and mathematics, with or without a sliding window. Declarations only."""

from edgevlm.families.parts import BOOKKEEPING, MISTRAL
from edgevlm.families.schema import Family, Keys

FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    keys=Keys(ignored=BOOKKEEPING),
    text_section=None,
    decoder=MISTRAL,
    decoder_model_types=("mistral",),
    decoder_prefixes=("model.",),
    head_prefixes=("lm_head.",),
)
