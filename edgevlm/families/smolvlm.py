"""SmolVLM and SmolVLM2 (256M, 500M, 2.2B): SigLIP tiles, pixel shuffle, a Llama decoder. Declarations only."""

from edgevlm.families.mmproj import IDEFICS3_MMPROJ
from edgevlm.families.parts import (
    BOOKKEEPING,
    IDEFICS3,
    IDEFICS3_PROCESSOR,
    LLAMA,
    OLD_BOOKKEEPING,
    PIXEL_SHUFFLE,
)
from edgevlm.families.schema import REQUIRED, Family, Keys, Vision
from edgevlm.families.templates import SMOLVLM
from edgevlm.spec import TileTexts

# Left by the programs that trained the models. transformers never reads them; where one would change the mathematics,
# only the value without effect is taken.
_TRAINING = (
    "is_llama_config", "neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor", "use_reentrant_checkpointing",
    "freeze_lm_head", "freeze_text_layers", "freeze_text_module_exceptions", "freeze_vision_layers",
    "freeze_vision_module_exceptions",
)  # fmt: skip
_TRAINING_SWITCHES = {"use_resampler": (False,), "qk_layer_norms": (False,), "rope_interleaved": (False,)}
# Copies of the decoder's keys, which only its own section decides.
_DECODER_COPIES = (
    "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pretraining_tp", "rms_norm_eps", "rope_scaling", "rope_theta", "vocab_size",
)  # fmt: skip

FAMILY = Family(
    name="smolvlm",
    hf_architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    keys=Keys(
        read={
            "vision_config": REQUIRED,
            "text_config": REQUIRED,
            "image_token_id": 128257,
            "tie_word_embeddings": False,
        },
        fixed=_TRAINING_SWITCHES,
        # the padding token is Idefics3-8B's, beyond these vocabularies; the decoder's own counts
        ignored=(*BOOKKEEPING, *OLD_BOOKKEEPING, *_TRAINING, *_DECODER_COPIES, "pad_token_id", "_pad_token_id"),
    ),
    text_section="text_config",
    text_keys=Keys(fixed=_TRAINING_SWITCHES, ignored=(*OLD_BOOKKEEPING, *_TRAINING)),
    decoder=LLAMA,
    decoder_prefixes=("model.text_model.", "text_model."),
    head_prefixes=("lm_head.",),
    vision=Vision(
        section="vision_config",
        processors=(IDEFICS3_PROCESSOR,),
        towers=(IDEFICS3,),
        tower_prefixes=("model.vision_model.", "vision_model."),
        connector=PIXEL_SHUFFLE,
        connector_prefixes=("model.connector.modality_projection.", "connector.modality_projection."),
        feature_layer=-1,
        feature_strategy="full",
        post_norm=True,
        image_token=("image_token_id",),
        tile_texts=TileTexts(
            tile="<fake_token_around_image><row_{row}_col_{column}>",
            row_end="\n",
            grid_end="\n",
            whole="<fake_token_around_image><global-img>",
            end="<fake_token_around_image>",
        ),
        control_tokens=("<fake_token_around_image>",),
    ),
    templates=(SMOLVLM,),
    mmproj=(IDEFICS3_MMPROJ,),
)
