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
from edgevlm.families.schema import REQUIRED, Family, Keys, Published, Vision
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

# Published files leave out what equals a default of the configuration classes.
_TOWER_BASE = {"model_type": "idefics3_vision", "hidden_size": 768, "image_size": 512, "patch_size": 16,
               "num_attention_heads": 12}  # fmt: skip
_TOWER_LARGE = {"model_type": "idefics3_vision", "hidden_size": 1152, "intermediate_size": 4304,
                "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}  # fmt: skip
_TEXT_256M = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
}  # fmt: skip
_TEXT_500M = {
    **_TEXT_256M, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
    "num_key_value_heads": 5,
}  # fmt: skip
_TEXT_2B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "vocab_size": 49280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 130000.0,
}  # fmt: skip
_IMAGES_512 = {
    "image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 512},
    "size": {"longest_edge": 2048}, "do_image_splitting": True, "resample": 1, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
_IMAGES_384 = {**_IMAGES_512, "max_image_size": {"longest_edge": 384}, "size": {"longest_edge": 1536}}

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
    title="SmolVLM and SmolVLM2",
    published=(
        Published(
            name="SmolVLM 256M, SmolVLM2 256M",
            repositories=("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"),
            licence="Apache-2.0",
            config={"vision_config": _TOWER_BASE, "text_config": _TEXT_256M, "scale_factor": 4,
                    "image_token_id": 49190},
            processor=_IMAGES_512,
        ),
        Published(
            name="SmolVLM 500M, SmolVLM2 500M",
            repositories=("HuggingFaceTB/SmolVLM-500M-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
            licence="Apache-2.0",
            config={"vision_config": _TOWER_BASE, "text_config": _TEXT_500M, "scale_factor": 4,
                    "image_token_id": 49190},
            processor=_IMAGES_512,
        ),
        Published(
            name="SmolVLM2 2.2B, SmolVLM 2.2B",
            repositories=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM-Instruct"),
            licence="Apache-2.0",
            config={"vision_config": _TOWER_LARGE, "text_config": _TEXT_2B, "scale_factor": 3,
                    "image_token_id": 49190},
            processor=_IMAGES_384,
        ),
    ),
)  # fmt: skip
