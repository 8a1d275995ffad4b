"""What published models of more than one family have in common. Declarations only."""

CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
CLIP_L_224 = {**CLIP_L_336, "image_size": 224}
CLIP_IMAGES_336 = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}  # fmt: skip
CLIP_IMAGES_224 = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_2_13B = {
    **LLAMA_2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40,
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
#: LLaVA's own layout.
LLAVA_TOP = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_hidden_size": 1024,
}  # fmt: skip
LLAMA_2_LICENCE = "Llama 2 Community"
LLAMA_3_LICENCE = 'Llama 3 Community: pass the licence and its notice on, show "Built with Meta Llama 3"'
TWO_FORMS = ("safetensors", "pytorch_model.bin")
