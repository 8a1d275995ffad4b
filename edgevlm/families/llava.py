"""LLaVA (1.5 and its relatives): a CLIP or SigLIP tower, two linear layers, a Llama decoder. Declarations only.

Prefixes: the released files, what transformers 5 saves, and its in-memory names, in that order.
"""

from edgevlm.families.mmproj import LLAVA_SIGLIP
from edgevlm.families.parts import (
    BOOKKEEPING,
    CLIP,
    CLIP_PROCESSOR,
    LLAMA,
    LLAVA_PROCESSOR,
    MLP,
    SIGLIP,
    SIGLIP_PROCESSOR,
)
from edgevlm.families.published import CLIP_IMAGES_336, CLIP_L_336, LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_LICENCE
from edgevlm.families.schema import REQUIRED, Family, Keys, Published, Vision

FAMILY = Family(
    name="llava",
    hf_architectures=("LlavaForConditionalGeneration",),
    keys=Keys(
        read={
            "vision_config": REQUIRED,
            "text_config": REQUIRED,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_token_index": None,
            "image_token_id": None,
            "image_seq_length": None,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
        ignored=(*BOOKKEEPING, "ignore_index", "vocab_size", "bos_token_id", "eos_token_id"),
    ),
    text_section="text_config",
    decoder=LLAMA,
    decoder_prefixes=("language_model.model.", "model.language_model."),
    head_prefixes=("language_model.lm_head.", "lm_head."),
    vision=Vision(
        section="vision_config",
        processors=(CLIP_PROCESSOR, SIGLIP_PROCESSOR, LLAVA_PROCESSOR),
        towers=(CLIP, SIGLIP),
        tower_prefixes=(
            "vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.",
            "model.vision_tower.vision_model.",
        ),
        connector=MLP,
        connector_prefixes=("multi_modal_projector.", "model.multi_modal_projector."),
        feature_layer="vision_feature_layer",
        feature_strategy="vision_feature_select_strategy",
        image_token=("image_token_index", "image_token_id"),
    ),
    mmproj=(LLAVA_SIGLIP,),
    title="LLaVA in Hugging Face's layout",
    published=(
        Published(
            name="LLaVA 1.5 7B",
            repositories=("llava-hf/llava-1.5-7b-hf",),
            licence=LLAMA_2_LICENCE,
            config={"vision_config": CLIP_L_336, "text_config": {**LLAMA_2_7B, "vocab_size": 32064},
                    "image_token_index": 32000},
            processor=CLIP_IMAGES_336,
        ),
        Published(
            name="LLaVA 1.5 13B",
            repositories=("llava-hf/llava-1.5-13b-hf",),
            licence=LLAMA_2_LICENCE,
            config={"vision_config": CLIP_L_336, "text_config": {**LLAMA_2_13B, "vocab_size": 32064},
                    "image_token_index": 32000},
            processor=CLIP_IMAGES_336,
        ),
    ),
)  # fmt: skip
