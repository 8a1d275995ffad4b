"""Tiny random text-only checkpoints of the Llama architecture and its relatives, written by transformers."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nasty
import tiny
import torch
import transformers


@dataclass(frozen=True, kw_only=True)
class TextVariant:
    """What sets one relative of Llama apart from another."""

    kind: str = "llama"
    tokenizer: str = "llama-bpe"
    rope: str = "default"
    tied: bool = False
    heads: int = 4
    heads_kv: int = 2
    head_dim: int | None = None
    window: int | None = None
    dtype: torch.dtype = torch.float32
    old_spelling: bool = False
    nasty: bool = False


VARIANTS = {
    "Llama 3.2": TextVariant(rope="llama3", tied=True, head_dim=32),
    "Llama 3.2 as transformers 4 writes it": TextVariant(rope="llama3", tied=True, old_spelling=True),
    "Llama 3": TextVariant(dtype=torch.bfloat16),
    "Llama 2": TextVariant(tokenizer="spm", heads_kv=4),
    "Vicuna 16k": TextVariant(tokenizer="spm", rope="linear", heads_kv=4, old_spelling=True),
    "SmolLM2": TextVariant(tokenizer="smollm", tied=True, heads=3, heads_kv=1, head_dim=16, dtype=torch.bfloat16),
    "DeepSeek-LLM": TextVariant(tokenizer="deepseek-llm", heads_kv=4),
    "Mistral": TextVariant(kind="mistral", tokenizer="spm"),
    "Mistral with a window": TextVariant(kind="mistral", tokenizer="spm", window=256, dtype=torch.bfloat16),
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
_made = tempfile.TemporaryDirectory(prefix="edgevlm-tiny-text-")


@functools.cache
def shared(variant: TextVariant) -> tuple[Path, transformers.PreTrainedModel]:
    """A checkpoint folder, made once for all tests, and its model. Read-only."""
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=_made.name))
    return folder, write(folder, variant)


def write(folder: Path, variant: TextVariant) -> transformers.PreTrainedModel:
    """Write a checkpoint and return the model that it holds (float32, evaluation mode)."""
    torch.manual_seed(11)
    tokenizer = nasty.make_tokenizer(variant.tokenizer) if variant.nasty else tiny.make_tokenizer(variant.tokenizer)
    make_config, make_model = _CLASSES[variant.kind]
    more = {"sliding_window": variant.window} if variant.kind == "mistral" else {}
    config = make_config(
        vocab_size=len(tokenizer) + 3, hidden_size=48 if variant.heads == 3 else 64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=variant.heads, num_key_value_heads=variant.heads_kv,
        head_dim=variant.head_dim, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_parameters=tiny.ROPES[variant.rope], tie_word_embeddings=variant.tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip
    model = make_model(config).eval()
    tiny.randomize(model)
    model.to(variant.dtype).save_pretrained(folder)
    tiny.write_texts(folder, tokenizer)
    if variant.old_spelling:
        tiny.rewrite_json(folder / "config.json", respell)
    return make_model.from_pretrained(folder, dtype=torch.float32).eval()


def respell(config: dict[str, object]) -> dict[str, object]:
    """config.json as transformers 4 wrote it: `rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    config = json.loads(json.dumps(config))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type") == "linear":
        rope["type"] = rope.pop("rope_type")  # the oldest name
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config
