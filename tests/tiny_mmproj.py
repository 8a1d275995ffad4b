"""llama.cpp `mmproj` files of the tiny checkpoints, as llama.cpp's converters write them.

`legacy` is `tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py` (LLaVA), `modern` is `conversion/` (SmolVLM).
Compared by hand with what these two write from the same checkpoints: every tensor is equal to the last byte, keys
differ in `general.name`, `general.size_label` and `clip.vision.projection_dim`, which nobody reads. `test_mmproj.py`
shows that llama.cpp's own reader takes them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

KINDS = gguf.GGUFValueType
TYPES = gguf.GGMLQuantizationType
_SPELLINGS = (  # of the tiny checkpoints and of LLaVA's own layout -> llama.cpp
    (r"^(?:model\.)?(?:vision_tower|vision_model)\.", "v."),
    (r"^(?:multi_modal_projector\.linear_1|model\.mm_projector\.0)\.", "mm.0."),
    (r"^(?:multi_modal_projector\.linear_2|model\.mm_projector\.2)\.", "mm.2."),
    (r"^model\.mm_projector\.", "mm."),
    (r"^model\.connector\.modality_projection\.proj\.", "mm.model.fc."),
    (r"vision_model\.", ""), (r"encoder\.layers\.", "blk."), (r"embeddings\.", ""), (r"_embedding", "_embd"),
    (r"self_attn\.(.)_proj", r"attn_\1"), (r"self_attn\.out_proj", "attn_out"), (r"layer_norm", "ln"),
    (r"pre_layrnorm", "pre_ln"), (r"post_layernorm", "post_ln"), (r"mlp\.fc1", "ffn_up"), (r"mlp\.fc2", "ffn_down"),
)  # fmt: skip


@dataclass
class File:
    """What a file will hold; tests change it before `save`.

    `keys`: value and type, of an array the type of its items; `types`: how a tensor is stored, F32 if it is not there.
    """

    keys: dict[str, tuple[Any, Any]]
    tensors: dict[str, np.ndarray]
    types: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "clip")
        for key, (value, kind) in self.keys.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, KINDS.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)
        for name, values in self.tensors.items():
            kind = self.types.get(name, TYPES.F32)
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def stored(self, name: str) -> np.ndarray:
        """What a reader finds: the numbers after rounding to the tensor's type."""
        kind = self.types.get(name, TYPES.F32)
        return gguf.quants.dequantize(gguf.quants.quantize(self.tensors[name], kind), kind)

    def rename(self, pattern: str, replacement: str) -> None:
        self.tensors = {re.sub(pattern, replacement, name): values for name, values in self.tensors.items()}
        self.types = {re.sub(pattern, replacement, name): kind for name, kind in self.types.items()}


def legacy(folder: Path, tower: Path | None = None, *, kind: Any = TYPES.F16, drop: bool = True) -> File:
    """LLaVA: last block and last norm left out (if `drop`), `fc1` and `fc2` exchanged, the convolution always F16."""
    config = json.loads(((tower or folder) / "config.json").read_text())["vision_config"]
    blocks = config["num_hidden_layers"] - drop
    found = {name: values for name, values in _tensors(folder, tower).items()
             if not drop or not name.startswith(("v.post_ln.", f"v.blk.{blocks}."))}  # fmt: skip
    file = File(
        {
            "clip.has_text_encoder": (False, KINDS.BOOL),
            "clip.has_vision_encoder": (True, KINDS.BOOL),
            "clip.has_llava_projector": (True, KINDS.BOOL),
            "general.file_type": (_file_type(kind), KINDS.UINT32),
            "general.name": ("tower", KINDS.STRING),
            "general.description": ("image encoder for LLaVA", KINDS.STRING),
            "clip.projector_type": ("mlp", KINDS.STRING),
            **_sizes(config, blocks, projection_dim=768),
            **_normalization(tower or folder),
            "clip.use_gelu": (config["hidden_act"] == "gelu", KINDS.BOOL),
        },
        found,
        {name: TYPES.F16 if values.ndim == 4 else kind for name, values in found.items() if values.ndim > 1},
    )
    file.rename(r"ffn_up\.", "ffn_x.")
    file.rename(r"ffn_down\.", "ffn_up.")
    file.rename(r"ffn_x\.", "ffn_down.")
    return file


def modern(folder: Path, *, kind: Any = TYPES.F16, epsilon: float = 1e-6) -> File:
    """SmolVLM: every block and the last norm, embeddings always F32, the convolution F16 in files of F16 only."""
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    vision = {"intermediate_size": 3072, "num_hidden_layers": 12} | config["vision_config"]
    found = _tensors(folder, None)
    wide = ("v.patch_embd.", "v.position_embd.")  # `.embeddings.` in the original's names
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return File(
        {
            "general.type": ("mmproj", KINDS.STRING),
            "general.name": ("tiny", KINDS.STRING),
            "general.file_type": (_file_type(kind), KINDS.UINT32),
            "general.quantization_version": (2, KINDS.UINT32),
            "clip.has_vision_encoder": (True, KINDS.BOOL),
            **_sizes(vision, vision["num_hidden_layers"], projection_dim=config["text_config"]["hidden_size"]),
            **_normalization(folder),
            "clip.projector_type": ("idefics3", KINDS.STRING),
            "clip.vision.attention.layer_norm_epsilon": (epsilon, KINDS.FLOAT32),
            "clip.vision.projector.scale_factor": (config["scale_factor"], KINDS.UINT32),
            "clip.use_gelu": (True, KINDS.BOOL),
            "clip.vision.preproc_image_size": (processor["size"]["longest_edge"], KINDS.UINT32),
        },
        found,
        {name: kind if values.shape[-1] % block == 0 else TYPES.F16 for name, values in found.items()
         if values.ndim > 1 and not name.startswith(wide)},
    )  # fmt: skip


def rounded(folder: Path, file: File, tower: Path | None = None) -> None:
    """Give a checkpoint the numbers that a file holds, so that both must convert to the same bytes."""
    old = "clip.has_llava_projector" in file.keys
    for path in (folder, tower) if tower else (folder,):
        tensors = load_file(path / "model.safetensors")
        for name in tensors:
            new = _spelled(name)
            if old:
                new = new.replace("ffn_up", "ffn_x").replace("ffn_down", "ffn_up").replace("ffn_x", "ffn_down")
            if new in file.tensors:
                tensors[name] = torch.from_numpy(file.stored(new).reshape(tensors[name].shape).copy())
        save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _tensors(folder: Path, tower: Path | None) -> dict[str, np.ndarray]:
    """Tensors of tower and connector by llama.cpp's modern names, float32."""
    found = {name: tensor for path in (folder, tower) if path for name, tensor in
             load_file(path / "model.safetensors").items()}  # fmt: skip
    named = {_spelled(name): tensor.float().numpy() for name, tensor in found.items()}
    return {
        name: values for name, values in named.items() if name.startswith(("v.", "mm.")) and "position_ids" not in name
    }


def _file_type(kind: Any) -> int:
    return int(gguf.LlamaFileType.ALL_F32 if kind == TYPES.F32 else gguf.LlamaFileType[f"MOSTLY_{kind.name}"])


def _spelled(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _sizes(config: dict[str, Any], blocks: int, *, projection_dim: int) -> dict[str, tuple[Any, Any]]:
    numbers = {
        "image_size": config["image_size"], "patch_size": config["patch_size"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "projection_dim": projection_dim, "attention.head_count": config["num_attention_heads"], "block_count": blocks,
    }  # fmt: skip
    epsilon = config.get("layer_norm_eps", 1e-6)
    return {f"clip.vision.{key}": (value, KINDS.UINT32) for key, value in numbers.items()} | {
        "clip.vision.attention.layer_norm_epsilon": (epsilon, KINDS.FLOAT32)
    }


def _normalization(folder: Path) -> dict[str, tuple[Any, Any]]:
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    return {f"clip.vision.{key}": (processor[key], KINDS.FLOAT32) for key in ("image_mean", "image_std")}
