"""LLaVA 1.0 as its own code saves it, merged with its base: one linear layer. Declarations only.

The language model's keys and tensors lie at the top, the tower in the repository that `mm_vision_tower` names.
"""

from edgevlm.families.mmproj import LLAVA_LINEAR
from edgevlm.families.parts import CLIP, CLIP_PROCESSOR, LLAMA, MM_KEYS, MM_LINEAR
from edgevlm.families.published import CLIP_IMAGES_224, CLIP_L_224, LLAMA_2_13B, LLAVA_TOP, TWO_FORMS
from edgevlm.families.schema import Family, Published, Vision
from edgevlm.families.templates import LLAVA_LLAMA3, LLAVA_V0, LLAVA_V1

FAMILY = Family(
    name="llava_linear",
    hf_architectures=("LlavaLlamaForCausalLM", "LlamaForCausalLM"),
    needs={"mm_vision_tower": (), "mm_projector_type": (None, "linear")},
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
        connector=MM_LINEAR,
        connector_prefixes=("model.mm_projector.",),
        feature_layer="mm_vision_select_layer",
        feature_strategy="mm_vision_select_feature",
        image_token=(),
        aspect="image_aspect_ratio",
        wrap=("mm_use_im_start_end", "<im_start>", "<im_end>"),
    ),
    mmproj=(LLAVA_LINEAR,),
    title="LLaVA 1.0, merged with its base model",
    published=(
        Published(
            name="LLaVA 1.0 13B",
            repositories=("liuhaotian/LLaVA-13b-delta-v0",),
            licence="LLaMA 1's, for research: the repository holds the difference from it, add it first",
            layouts=TWO_FORMS,
            config={**LLAVA_TOP, **LLAMA_2_13B, "mm_use_im_start_end": True, "vocab_size": 32003,
                    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
            processor=CLIP_IMAGES_224,
            tower=CLIP_L_224,
        ),
    ),
)  # fmt: skip
