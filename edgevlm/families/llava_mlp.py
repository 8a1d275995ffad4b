"""LLaVA 1.5 and LLaVA++ as their own code saves them: two linear layers. Declarations only.

The language model's keys and tensors lie at the top, the tower in the repository that `mm_vision_tower` names.
"""

from edgevlm.families.mmproj import LLAVA_MLP
from edgevlm.families.parts import CLIP, CLIP_PROCESSOR, LLAMA, MM_KEYS, MM_MLP
from edgevlm.families.published import (
    CLIP_IMAGES_336,
    CLIP_L_336,
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_LICENCE,
    LLAMA_3_8B,
    LLAMA_3_LICENCE,
    LLAVA_TOP,
    TWO_FORMS,
)
from edgevlm.families.schema import Family, Published, Vision
from edgevlm.families.templates import LLAVA_LLAMA3, LLAVA_V0, LLAVA_V1

FAMILY = Family(
    name="llava_mlp",
    hf_architectures=("LlavaLlamaForCausalLM",),
    needs={"mm_vision_tower": (), "mm_projector_type": ("mlp2x_gelu",)},
    keys=MM_KEYS,
    text_section=None,
    decoder=LLAMA,
    decoder_model_types=("llama", "llava", "llava_llama"),
    decoder_prefixes=("model.",),
    head_prefixes=("lm_head.",),
    templates=(LLAVA_LLAMA3, LLAVA_V1, LLAVA_V0),
    vision=Vision(
        section="vision_config",
        separate=True,
        processors=(CLIP_PROCESSOR,),
        towers=(CLIP,),
        tower_prefixes=("tower:vision_model.", "tower:"),
        connector=MM_MLP,
        connector_prefixes=("model.mm_projector.",),
        feature_layer="mm_vision_select_layer",
        feature_strategy="mm_vision_select_feature",
        image_token=(),
        aspect="image_aspect_ratio",
        wrap=("mm_use_im_start_end", "<im_start>", "<im_end>"),
    ),
    mmproj=(LLAVA_MLP,),
    title="LLaVA 1.5 and LLaVA++ in their own layout",
    published=(
        Published(
            name="LLaVA 1.5 7B",
            repositories=("liuhaotian/llava-v1.5-7b",),
            licence=LLAMA_2_LICENCE,
            layouts=TWO_FORMS,
            config={**LLAVA_TOP, **LLAMA_2_7B, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
            processor=CLIP_IMAGES_336,
            tower=CLIP_L_336,
        ),
        Published(
            name="LLaVA 1.5 13B",
            repositories=("liuhaotian/llava-v1.5-13b",),
            licence=LLAMA_2_LICENCE,
            layouts=TWO_FORMS,
            config={**LLAVA_TOP, **LLAMA_2_13B, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
            processor=CLIP_IMAGES_336,
            tower=CLIP_L_336,
        ),
        Published(
            name="LLaVA++ Llama 3 8B",
            repositories=("MBZUAI/LLaVA-Meta-Llama-3-8B-Instruct",),
            licence=LLAMA_3_LICENCE,
            config={**LLAVA_TOP, **LLAMA_3_8B, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
            processor=CLIP_IMAGES_336,
            tower=CLIP_L_336,
        ),
    ),
)  # fmt: skip
