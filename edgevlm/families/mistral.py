"""Mistral 7B, text only: Llama's tensors and mathematics, with or without a sliding window. Declarations only."""

from edgevlm.families.parts import BOOKKEEPING, MISTRAL
from edgevlm.families.published import TWO_FORMS
from edgevlm.families.schema import Family, Keys, Published

_MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    "sliding_window": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip

FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    keys=Keys(ignored=BOOKKEEPING),
    text_section=None,
    decoder=MISTRAL,
    decoder_model_types=("mistral",),
    decoder_prefixes=("model.",),
    head_prefixes=("lm_head.",),
    title="Mistral, text only",
    published=(
        Published(
            name="Mistral 7B v0.1",
            repositories=("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
            licence="Apache-2.0",
            layouts=TWO_FORMS,
            config=_MISTRAL_7B,
        ),
    ),
)
