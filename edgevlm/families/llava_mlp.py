"""LLaVA 1.5 and LLaVA++ as their own code saves them: two linear layers. Declarations only.

The language model's keys and tensors lie at the top, the tower in the repository that `mm_vision_tower` names.
"""

from edgevlm.families.mmproj import LLAVA_MLP
from edgevlm.families.parts import CLIP, CLIP_PROCESSOR, LLAMA, MM_KEYS, MM_MLP
from edgevlm.families.schema import Family, Vision
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
)
