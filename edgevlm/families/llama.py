"""Llama and its relatives, text only: Llama 2, 3, 3.1, 3.2, SmolLM2, Vicuna, DeepSeek-LLM. Declarations only."""

from edgevlm.families.parts import BOOKKEEPING, LLAMA
from edgevlm.families.schema import Family, Keys

FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM",),
    keys=Keys(ignored=BOOKKEEPING),
    text_section=None,
    decoder=LLAMA,
    decoder_prefixes=("model.",),
    head_prefixes=("lm_head.",),
)
