"""Known parts: towers, connectors, decoders and image processors that families are made of. Declarations only.

Defaults are those of the Hugging Face configuration classes (transformers 5.23), which write sparse files.
"""

from edgevlm.families.schema import REQUIRED, Keys, Part, Processor, Tower, Weight

#: Keys that every section may carry and that say nothing about the numbers.
BOOKKEEPING = (
    "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map",
    "initializer_range", "initializer_factor", "use_cache", "return_dict", "output_hidden_states",
    "output_attentions", "attention_dropout", "dropout", "torchscript", "use_bfloat16", "is_encoder_decoder",
    "is_decoder", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "gradient_checkpointing",
    "_attn_implementation_autoset", "_commit_hash", "attn_implementation", "_attn_implementation",
)  # fmt: skip

#: What transformers 4 wrote into every section beside that: mostly defaults of text generation.
OLD_BOOKKEEPING = (
    "_flash_attn_2_enabled", "add_cross_attention", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "typical_p", "transformers.js_config",
)  # fmt: skip
#: The same with what a tower has no use for either.
_GENERATION = (
    *OLD_BOOKKEEPING, "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip

_BLOCK = {
    "encoder.layers.{i}.layer_norm1.weight": Weight("blk.{i}.ln1.weight", ("hidden",)),
    "encoder.layers.{i}.layer_norm1.bias": Weight("blk.{i}.ln1.bias", ("hidden",)),
    "encoder.layers.{i}.self_attn.q_proj.weight": Weight("blk.{i}.q.weight", ("hidden", "hidden")),
    "encoder.layers.{i}.self_attn.q_proj.bias": Weight("blk.{i}.q.bias", ("hidden",)),
    "encoder.layers.{i}.self_attn.k_proj.weight": Weight("blk.{i}.k.weight", ("hidden", "hidden")),
    "encoder.layers.{i}.self_attn.k_proj.bias": Weight("blk.{i}.k.bias", ("hidden",)),
    "encoder.layers.{i}.self_attn.v_proj.weight": Weight("blk.{i}.v.weight", ("hidden", "hidden")),
    "encoder.layers.{i}.self_attn.v_proj.bias": Weight("blk.{i}.v.bias", ("hidden",)),
    "encoder.layers.{i}.self_attn.out_proj.weight": Weight("blk.{i}.o.weight", ("hidden", "hidden")),
    "encoder.layers.{i}.self_attn.out_proj.bias": Weight("blk.{i}.o.bias", ("hidden",)),
    "encoder.layers.{i}.layer_norm2.weight": Weight("blk.{i}.ln2.weight", ("hidden",)),
    "encoder.layers.{i}.layer_norm2.bias": Weight("blk.{i}.ln2.bias", ("hidden",)),
    "encoder.layers.{i}.mlp.fc1.weight": Weight("blk.{i}.fc1.weight", ("intermediate", "hidden")),
    "encoder.layers.{i}.mlp.fc1.bias": Weight("blk.{i}.fc1.bias", ("intermediate",)),
    "encoder.layers.{i}.mlp.fc2.weight": Weight("blk.{i}.fc2.weight", ("hidden", "intermediate")),
    "encoder.layers.{i}.mlp.fc2.bias": Weight("blk.{i}.fc2.bias", ("hidden",)),
}

# The norm after the last block belongs to `last_hidden_state`; models that select a hidden state go without it.
_POST_NORM = {
    "post_layernorm.weight": Weight("post_norm.weight", ("hidden",), when="post_norm"),
    "post_layernorm.bias": Weight("post_norm.bias", ("hidden",), when="post_norm"),
}

_PATCHES = {
    "embeddings.patch_embedding.weight": Weight("patch.weight", ("hidden", "channels", "patch", "patch")),
    "embeddings.patch_embedding.bias": Weight("patch.bias", ("hidden",)),
    "embeddings.position_embedding.weight": Weight("position.weight", ("positions", "hidden")),
}

#: SigLIP and what grew out of it.
SIGLIP_WEIGHTS = {**_PATCHES, **_BLOCK, **_POST_NORM}

SIGLIP = Tower(
    kind="siglip",
    model_type="siglip_vision_model",
    class_token=0,
    keys=Keys(
        read={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
        },
        fixed={"num_channels": (3,), "tie_last_hidden_states": (None, False)},
        ignored=(*BOOKKEEPING, "vision_use_head", "projection_dim", "vocab_size"),
    ),
    weights={
        **_PATCHES,
        **_BLOCK,
        **_POST_NORM,
    },
    unused=("embeddings.position_ids", "head.*", "post_layernorm.*"),
)

# SigLIP under another configuration class, which is used whatever `model_type` says. Its positions are computed from
# the picture's size; for whole tiles, the only ones that exist, they are the table's own order.
IDEFICS3 = Tower(
    kind="siglip",
    model_type="idefics3_vision",
    aliases=("smolvlm_vision", "idefics3", "smolvlm", "siglip_vision_model", ""),
    class_token=0,
    keys=Keys(
        read={
            "hidden_size": 1152,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 32,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
        },
        fixed={"num_channels": (3,)},
        # the sizes of pictures are the image processor's to say
        ignored=(
            *BOOKKEEPING, *OLD_BOOKKEEPING, "size", "max_image_size", "use_base_siglip", "tie_word_embeddings",
            "projection_class", "ignore_index", "pad_token_id", "vision_use_head", "projection_dim",
        ),
    ),
    weights={**_PATCHES, **_BLOCK, **_POST_NORM},
    unused=("embeddings.position_ids",),
)  # fmt: skip

CLIP = Tower(
    kind="clip",
    model_type="clip_vision_model",
    class_token=1,
    keys=Keys(
        read={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
        },
        fixed={"num_channels": (3,), "tie_last_hidden_states": (None, False), "pruned_heads": (None, {})},
        ignored=(*BOOKKEEPING, *_GENERATION, "projection_dim", "vocab_size"),
    ),
    weights={
        "embeddings.class_embedding": Weight("class.weight", ("hidden",)),
        "embeddings.patch_embedding.weight": Weight("patch.weight", ("hidden", "channels", "patch", "patch")),
        "embeddings.position_embedding.weight": Weight("position.weight", ("positions", "hidden")),
        "pre_layrnorm.weight": Weight("pre_norm.weight", ("hidden",)),  # the misspelling is CLIP's own
        "pre_layrnorm.bias": Weight("pre_norm.bias", ("hidden",)),
        **_BLOCK,
    },
    # CLIP applies its last norm to the pooled class token only, which no connector reads.
    unused=(
        "embeddings.position_ids",
        "post_layernorm.*",
        "text_model.*",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ),
)

MLP = Part(
    kind="mlp",
    keys=Keys(read={"projector_hidden_act": "gelu", "multimodal_projector_bias": True}),
    weights={
        "linear_1.weight": Weight("fc1.weight", ("n_embd", "features")),
        "linear_1.bias": Weight("fc1.bias", ("n_embd",), when="connector_bias"),
        "linear_2.weight": Weight("fc2.weight", ("n_embd", "n_embd")),
        "linear_2.bias": Weight("fc2.bias", ("n_embd",), when="connector_bias"),
    },
)

PIXEL_SHUFFLE = Part(
    kind="pixel_shuffle",
    keys=Keys(read={"scale_factor": 2}),
    weights={"proj.weight": Weight("fc1.weight", ("n_embd", "features"))},
)

LINEAR_WEIGHTS = {
    "weight": Weight("fc1.weight", ("n_embd", "features")),
    "bias": Weight("fc1.bias", ("n_embd",)),
}
LINEAR = Part(kind="linear", keys=Keys(), weights=LINEAR_WEIGHTS)

_LLAMA_READ = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
_LLAMA_WEIGHTS = {
    "embed_tokens.weight": Weight("token_embd.weight", ("vocab", "n_embd")),
    "norm.weight": Weight("output_norm.weight", ("n_embd",)),
    "layers.{i}.input_layernorm.weight": Weight("blk.{i}.attn_norm.weight", ("n_embd",)),
    "layers.{i}.self_attn.q_proj.weight": Weight(
        "blk.{i}.attn_q.weight", ("q_rows", "n_embd"), transform="rope_interleave:heads"
    ),
    "layers.{i}.self_attn.k_proj.weight": Weight(
        "blk.{i}.attn_k.weight", ("kv_rows", "n_embd"), transform="rope_interleave:heads_kv"
    ),
    "layers.{i}.self_attn.v_proj.weight": Weight("blk.{i}.attn_v.weight", ("kv_rows", "n_embd")),
    "layers.{i}.self_attn.o_proj.weight": Weight("blk.{i}.attn_output.weight", ("n_embd", "q_rows")),
    "layers.{i}.post_attention_layernorm.weight": Weight("blk.{i}.ffn_norm.weight", ("n_embd",)),
    "layers.{i}.mlp.gate_proj.weight": Weight("blk.{i}.ffn_gate.weight", ("n_ff", "n_embd")),
    "layers.{i}.mlp.up_proj.weight": Weight("blk.{i}.ffn_up.weight", ("n_ff", "n_embd")),
    "layers.{i}.mlp.down_proj.weight": Weight("blk.{i}.ffn_down.weight", ("n_embd", "n_ff")),
}
_LLAMA_BUFFERS = ("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")  # of old releases

#: As `mlp` and `linear`, in the names of LLaVA's own code.
MM_MLP = Part(
    kind="mlp",
    keys=Keys(fixed={"mm_projector_type": ("mlp2x_gelu",)}),
    weights={
        "0.weight": Weight("fc1.weight", ("n_embd", "features")),
        "0.bias": Weight("fc1.bias", ("n_embd",)),
        "2.weight": Weight("fc2.weight", ("n_embd", "n_embd")),
        "2.bias": Weight("fc2.bias", ("n_embd",)),
    },
)
MM_LINEAR = Part(kind="linear", keys=Keys(fixed={"mm_projector_type": ("linear", None)}), weights=LINEAR_WEIGHTS)

#: What LLaVA's own code writes into config.json beside the language model's keys.
MM_KEYS = Keys(
    read={
        "mm_vision_select_layer": REQUIRED,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_hidden_size": None,
        "image_aspect_ratio": None,
    },
    fixed={
        "mm_patch_merge_type": (None, "flat"),
        "mm_resampler_type": (None,),
        "use_mm_proj": (True, None),
        "image_grid_pinpoints": (None,),
    },
    ignored=(
        "mm_vision_tower", "mm_use_im_patch_token", "mm_projector_lr", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter",
        "freeze_mm_vision_resampler", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "pretrain_mm_mlp_adapter",
        "tokenizer_model_max_length", "tokenizer_padding_side", "mm_vision_tower_lr", "sep_image_conv_front",
        "image_token_len", "vision_tower",
    ),
)  # fmt: skip

LLAMA = Part(
    kind="llama",
    keys=Keys(
        read=_LLAMA_READ,
        # SmolLM2 says of its rows, as everybody, that they are in halves
        fixed={**_LLAMA_FIXED, "rope_interleaved": (False, None)},
        ignored=(*BOOKKEEPING, "pretraining_tp", "max_sequence_length", "is_llama_config", "transformers.js_config"),
    ),
    weights=_LLAMA_WEIGHTS,
    unused=_LLAMA_BUFFERS,
)

#: Llama's mathematics, and attention that may see the last `sliding_window` positions only.
MISTRAL = Part(
    kind="llama",
    keys=Keys(
        read={
            **_LLAMA_READ,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed=_LLAMA_FIXED,
        ignored=BOOKKEEPING,
    ),
    weights=_LLAMA_WEIGHTS,
    unused=_LLAMA_BUFFERS,
)

_SWITCHES = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,)}
_PROCESSOR_BOOKKEEPING = (
    "image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "_processor_class",
    "data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "default_to_square",
    "image_seq_length", "do_convert_rgb", "pad_size",
    "_valid_processor_keys",
)  # fmt: skip
_CLIP_DEFAULTS = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

SIGLIP_PROCESSOR = Processor(
    names=("SiglipImageProcessor",),
    keys=Keys(
        read={
            "size": {"height": 224, "width": 224},
            "crop_size": None,
            "do_center_crop": False,
            "do_pad": False,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        fixed=_SWITCHES,
        ignored=_PROCESSOR_BOOKKEEPING,
    ),
)
CLIP_PROCESSOR = Processor(
    names=("CLIPImageProcessor", "CLIPFeatureExtractor"),
    keys=Keys(read=_CLIP_DEFAULTS, fixed=_SWITCHES, ignored=_PROCESSOR_BOOKKEEPING),
)
LLAVA_PROCESSOR = Processor(
    names=("LlavaImageProcessor",),
    pads=True,
    keys=Keys(read=_CLIP_DEFAULTS, fixed=_SWITCHES, ignored=_PROCESSOR_BOOKKEEPING),
)
IDEFICS3_PROCESSOR = Processor(
    names=("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    tiles=True,
    keys=Keys(
        read={
            "size": {"longest_edge": 1456},
            "max_image_size": {"longest_edge": 364},
            "do_image_splitting": True,
            "resample": 1,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        fixed=_SWITCHES,
        # all tiles have one size, so there is nothing to pad
        ignored=(*_PROCESSOR_BOOKKEEPING, "do_pad", "return_row_col_info", "video_sampling"),
    ),
)
