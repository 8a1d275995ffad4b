"""Tiny random SmolVLM and Idefics3 checkpoints, written by transformers, and the processor to compare with."""

from __future__ import annotations

import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

FAKE, IMAGE = "<fake_token_around_image>", tiny.IMAGE_TOKEN
ROWS = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
#: SmolVLM's own, with the names of the tiny tokenizer: it prints its first token itself, and texts only as parts.
TEMPLATE = (
    "<|start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
#: What config.json of SmolVLM2-500M-Video-Instruct says beside the sizes.
RELEASED_TOP = {
    "pad_token_id": 128002, "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.1",
    "use_cache": False, "use_reentrant_checkpointing": False,
}  # fmt: skip
RELEASED_TEXT = {
    "architectures": ["VLlama3ForCausalLM"], "is_llama_config": True, "model_type": "llama", "neftune_noise_alpha": 0.0,
    "pad_token_id": 2, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_theta": 100000, "torch_dtype": "bfloat16", "use_resampler": False,
}  # fmt: skip
RELEASED_VISION = {"tie_word_embeddings": False, "use_base_siglip": False}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a tiny checkpoint is made of.

    `rows`: whether the vocabulary has the tokens of `ROWS`; `released`: whether config.json is sparse and full of
    left-overs, as the published ones are, with the classes' defaults for everything that they leave out.
    """

    kind: str = "smolvlm"
    split: bool = True
    rows: bool = True
    side_px: int = 56
    hidden: int = 48
    factor: int = 2
    longest_px: int = 112
    released: bool = False
    dtype: torch.dtype = torch.float32


_made = tempfile.TemporaryDirectory(prefix="edgevlm-tiny-smolvlm-")


@functools.cache
def shared(variant: Variant) -> tuple[Path, Any, Any]:
    """(folder, model, processor) of a checkpoint, made once for all tests. Read-only."""
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=_made.name))
    return folder, *write(folder, variant)


def copy(variant: Variant, folder: Path) -> Path:
    """A copy of a checkpoint that may be changed."""
    return Path(shutil.copytree(shared(variant)[0], folder))


def write(folder: Path, variant: Variant) -> tuple[Any, Any]:
    """Write a checkpoint; returns the model (float32) and the processor that it is used with."""
    torch.manual_seed(11)
    tokenizer = make_tokenizer(rows=variant.rows)
    smolvlm = variant.kind == "smolvlm"
    config = (transformers.SmolVLMConfig if smolvlm else transformers.Idefics3Config)(
        vision_config=_vision(variant),
        text_config=_text(variant, len(tokenizer) + 3, tokenizer),  # three rows without a token
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=variant.factor,
    )
    name = "SmolVLMForConditionalGeneration" if smolvlm else "Idefics3ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    tiny.randomize(model)
    model.to(variant.dtype).save_pretrained(folder)
    image_processor = (SmolVLMImageProcessorPil if smolvlm else Idefics3ImageProcessorPil)(
        do_image_splitting=variant.split,
        size={"longest_edge": variant.longest_px},
        max_image_size={"longest_edge": variant.side_px},
    )
    image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    if variant.released:
        tiny.rewrite_json(folder / "config.json", _as_released)
    n_tokens = (variant.side_px // 14 // variant.factor) ** 2
    # SmolVLM's processor makes the same text, but cannot be had without a package that spells out numbers.
    processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=n_tokens)
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval(), processor


def make_tokenizer(*, rows: bool) -> transformers.PreTrainedTokenizerFast:
    """SmolLM's kind, with the tokens around tiles; without `rows` as SmolVLM-Instruct of 2.2 billion has it."""
    tokenizer = tiny.make_tokenizer("smollm")
    special = [FAKE, "<end_of_utterance>", *(ROWS if rows else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    return tokenizer


def _vision(variant: Variant) -> dict[str, Any]:
    sizes = {"hidden_size": variant.hidden, "num_attention_heads": 3, "image_size": variant.side_px, "patch_size": 14}
    return sizes if variant.released else {**sizes, "intermediate_size": 80, "num_hidden_layers": 3}


def _text(variant: Variant, vocab: int, tokenizer: Any) -> dict[str, Any]:
    """With `released` 32 heads, which is what LlamaConfig has when a file does not say."""
    heads = {} if variant.released else {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def _as_released(config: dict[str, Any]) -> dict[str, Any]:
    """Only what the published files say: everything else is the default of a class, which the converter must know."""
    text, vision = config["text_config"], config["vision_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "vocab_size")
    return {
        "architectures": config["architectures"],
        "model_type": config["model_type"],
        "image_token_id": config["image_token_id"],
        "scale_factor": config["scale_factor"],
        "vocab_size": text["vocab_size"],
        "text_config": {**RELEASED_TEXT, **{key: text[key] for key in sizes}, "pixel_shuffle_factor": 4},
        "vision_config": {
            **RELEASED_VISION,
            **{key: vision[key] for key in ("hidden_size", "num_attention_heads", "image_size", "patch_size")},
            "model_type": vision["model_type"],
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": 512},
        },
        **RELEASED_TOP,
    }
