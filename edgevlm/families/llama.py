"""Llama and its relatives, text only: Llama 2, 3, 3.1, 3.2, SmolLM2, Vicuna, DeepSeek-LLM. Declarations only."""

from edgevlm.families.parts import BOOKKEEPING, LLAMA
from edgevlm.families.published import LLAMA_2_7B, LLAMA_2_LICENCE, LLAMA_3_8B, LLAMA_3_LICENCE, TWO_FORMS
from edgevlm.families.schema import Family, Keys, Published

_LLAMA_32 = 'Llama 3.2 Community: pass the licence and its notice on, show "Built with Llama", names begin with Llama'
_ROPE_32 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA_32_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": _ROPE_32, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_32_3B = {
    **_LLAMA_32_1B, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
}  # fmt: skip

FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM",),
    keys=Keys(ignored=BOOKKEEPING),
    text_section=None,
    decoder=LLAMA,
    decoder_prefixes=("model.",),
    head_prefixes=("lm_head.",),
    title="Llama and its relatives, text only",
    published=(
        Published(
            name="Llama 3.2 1B",
            repositories=("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
            licence=_LLAMA_32,
            config=_LLAMA_32_1B,
            tied=True,
        ),
        Published(
            name="Llama 3.2 3B",
            repositories=("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
            licence=_LLAMA_32,
            config=_LLAMA_32_3B,
            tied=True,
        ),
        Published(
            name="Llama 3 8B",
            repositories=("meta-llama/Meta-Llama-3-8B-Instruct",),
            licence=LLAMA_3_LICENCE,
            config=LLAMA_3_8B,
        ),
        Published(
            name="Vicuna 1.5 7B, Llama 2 7B",
            repositories=("lmsys/vicuna-7b-v1.5", "meta-llama/Llama-2-7b-chat-hf"),
            licence=LLAMA_2_LICENCE,
            layouts=TWO_FORMS,
            config=LLAMA_2_7B,
        ),
    ),
)
