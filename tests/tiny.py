"""Tiny random checkpoints, written by transformers in its own layout: the reference that conversions are compared with.

Only tests import this file; it is the place where torch and transformers appear.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

SIDE_PX, PATCH_PX = 56, 14
IMAGE_TOKEN = "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
#: Words, numbers, scripts and spaces that the tokenizer learns from; the tests use the same alphabets.
CORPUS = [
    "The red lamp is on, the gauge reads 73.5 psi.", "Don't stop; we'll see what they've done.",
    "x = [1, 2, 3]\n\tprint(x)\n\n\n", "Größe, café, naïve, 東京タワー, Привет мир, 안녕하세요", "🙂🚀 emoji 👩‍👩‍👧",
    "    four spaces   and\ttabs  ", "aaaaaaaaaa 1234567890", "UPPER lower MiXeD", "https://example.org/a?b=c&d=e#f",
]  # fmt: skip
SPECIAL = ["<|begin|>", "<|end|>", "<|start|>", IMAGE_TOKEN]
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: As deepseek-llm-7b's tokenizer.json has them; written out here a second time, because a test compares them.
DEEPSEEK_REGEXES = (
    "[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
)
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a tiny checkpoint is made of; every field is one that conversions have got wrong somewhere."""

    tower: str = "siglip"
    tokenizer: str = "llama-bpe"
    feature_layer: int = -1
    strategy: str = "full"
    tied: bool = False
    rope: str = "default"
    dtype: torch.dtype = torch.float32
    hidden: int = 64
    n_ff: int = 96
    layers: int = 2
    head_dim: int | None = None
    heads_kv: int = 2
    activation: str | None = None
    bias: bool = True


_made = tempfile.TemporaryDirectory(prefix="edgevlm-tiny-")


@functools.cache
def shared(variant: Variant) -> tuple[Path, transformers.LlavaForConditionalGeneration]:
    """A checkpoint folder, made once for all tests, and its model. Read-only: use `copy` to change something."""
    # not named by its hash: that of -1 and -2, as feature layers, is the same
    folder = Path(tempfile.mkdtemp(prefix=f"{variant.tower}-", dir=_made.name))
    return folder, write(folder, variant)


def copy(variant: Variant, folder: Path) -> Path:
    """A copy of a checkpoint that may be changed."""
    return Path(shutil.copytree(shared(variant)[0], folder))


def write(folder: Path, variant: Variant) -> transformers.LlavaForConditionalGeneration:
    """Write a checkpoint and return the model that it holds (float32, evaluation mode)."""
    torch.manual_seed(7)
    tokenizer = make_tokenizer(variant.tokenizer)
    index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = transformers.LlavaConfig(
        vision_config=_vision(variant),
        text_config=_text(variant, len(tokenizer) + 3, tokenizer),  # three rows without a token
        vision_feature_layer=variant.feature_layer,
        vision_feature_select_strategy=variant.strategy,
        image_token_index=index,
        image_seq_length=(SIDE_PX // PATCH_PX) ** 2 + (variant.tower == "clip") - (variant.strategy == "default"),
        tie_word_embeddings=variant.tied,
        multimodal_projector_bias=variant.bias,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomize(model)
    model.to(variant.dtype).save_pretrained(folder)
    _processor(variant).save_pretrained(folder)
    write_texts(folder, tokenizer)
    # Read back rather than widened in place: `.to` also rounds the rotary frequencies, which no checkpoint stores.
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def write_texts(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """The files of a checkpoint that are neither numbers nor settings of them."""
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: tiny/random\n---\n# Tiny\n")


def randomize(model: torch.nn.Module) -> None:
    """Give a model weights of a size at which every part of it shows in the result."""
    with torch.no_grad():  # the default initialisation is so small that wrong mathematics would hide in it
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            else:
                tables = {"position_embedding": 0.02, "embed_tokens": 0.3}
                spread = next((value for key, value in tables.items() if key in name), None)
                parameter.normal_(0, spread or 1.2 / parameter[0].numel() ** 0.5)


def _vision(variant: Variant) -> Any:
    sizes = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": SIDE_PX, "patch_size": PATCH_PX,
    }  # fmt: skip
    if variant.activation:
        sizes["hidden_act"] = variant.activation  # type: ignore[assignment]
    classes = {"siglip": transformers.SiglipVisionConfig, "clip": transformers.CLIPVisionConfig}
    return classes[variant.tower](**sizes)


def _text(variant: Variant, vocab: int, tokenizer: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=variant.hidden, intermediate_size=variant.n_ff, num_hidden_layers=variant.layers,
        num_attention_heads=4, num_key_value_heads=variant.heads_kv, head_dim=variant.head_dim,
        max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_parameters=ROPES[variant.rope], tie_word_embeddings=variant.tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _processor(variant: Variant) -> Any:
    if variant.tower == "siglip":
        return transformers.SiglipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX})
    crop = {"height": SIDE_PX, "width": SIDE_PX}
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=crop)


def make_tokenizer(kind: str, corpus: list[str] = CORPUS * 4, size: int = 480) -> transformers.PreTrainedTokenizerFast:
    """Train a small tokenizer: `llama-bpe`, `smollm`, `gpt-2`, `deepseek-llm` (byte-level), `spm` (byte fallback)."""
    spm = kind == "spm"
    model = (
        tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True) if spm else tokenizers.models.BPE()
    )
    tokenizer = tokenizers.Tokenizer(model)
    pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    if spm:
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    else:
        split = pre.Split(tokenizers.Regex(LLAMA3_REGEX), "isolated")
        tokenizer.pre_tokenizer = {
            "llama-bpe": pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
            "smollm": pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
            "gpt-2": pre.ByteLevel(add_prefix_space=False),
            "deepseek-llm": pre.Sequence(
                [
                    *(pre.Split(tokenizers.Regex(regex), "isolated") for regex in DEEPSEEK_REGEXES),
                    pre.Digits(individual_digits=True),
                    pre.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        }[kind]
        tokenizer.decoder = decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    bos, eos = ("<s>", "</s>") if spm else ("<|begin|>", "<|end|>")
    if spm:
        _clear_added(tokenizer)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(text, special=True) for text in ([bos, eos] if spm else []) + SPECIAL]
    )
    tokenizer.add_tokens([tokenizers.AddedToken("[extra]", normalized=False)])  # added, but not special
    if kind in ("llama-bpe", "deepseek-llm", "spm"):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                                **({"unk_token": "<unk>"} if spm else {}))  # fmt: skip


def _clear_added(tokenizer: tokenizers.Tokenizer) -> None:
    """The trainer declares its first tokens special; bytes of a real vocabulary are ordinary tokens."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if not entry["content"].startswith("<0x")]
    fresh = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.__setstate__(fresh.__getstate__())


def rewrite_tensors(folder: Path, change: Any) -> None:
    """Replace model.safetensors by what `change(tensors)` returns, a dict of torch tensors by name."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def rewrite_json(path: Path, change: Any) -> None:
    """Replace a JSON file by what `change(data)` returns."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
