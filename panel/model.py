"""The model in Hugging Face's LLaVA layout: SigLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from panel.dataset import IMAGE_SIDE
from panel.tokens import BOS, CHAT_TEMPLATE, EOT, IMAGE, PAD

PATCH = 16
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Shapes of the model. The decoder's rows are multiples of 256, so that every k-quant applies."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", BOS), ("eot", EOT), ("pad", PAD))}
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eot"],
        pad_token_id=ids["pad"],
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A model with random weights, float32."""
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in (EOT, "<|end_of_text|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        do_sample=False,
    )
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that belongs to the model: bicubic resize to the tower's size, then (x / 255 - 0.5) / 0.5."""
    images = SiglipImageProcessor(
        size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        resample=3,  # PIL.Image.Resampling.BICUBIC
        do_convert_rgb=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def pixels_BCHW(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 pictures of the tower's size -> the float32 tensor that the processor makes of them."""
    return images_BCHW.float() / 127.5 - 1.0


def image_features_BTC(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's tokens that the projector reads: (B, 64, 192).

    `vision_feature_layer` -1 is the output of the last encoder layer, before the tower's final layer norm.
    """
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint with its processor, as `from_pretrained` reads it."""
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    half = LlavaForConditionalGeneration(model.config).to(torch.bfloat16)
    half.load_state_dict(state)
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
