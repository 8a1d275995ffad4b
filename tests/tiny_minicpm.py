"""Tiny random checkpoints in MiniCPM-Llama3-V 2.5's own layout, and a reference for it; transformers has no class.

The reference shares nothing with the package: Pillow resizes and cuts, the tower is transformers' Idefics2 on a strip
of patches, the resampler is written out with torch's own attention, and the prompt is one text.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionTransformer

PATCH_PX = 14
TOKENS = ["<unk>", "</image>", "<slice>", "</slice>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
#: The repository's own: texts only, and an assistant's turn whether asked for or not.
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
#: What config.json says beside the sizes.
RELEASED = {
    "version": "2.5", "architectures": ["MiniCPMV"], "model_type": "minicpmv", "batch_vision_input": True,
    "drop_vision_last_layer": False, "image_size": 448, "mm_use_im_start_end": True, "slice_mode": True,
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "transformers_version": "4.40.0",
    "torch_dtype": "float16", "use_cache": True, "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
}  # fmt: skip
#: The same in Llama 3-V's config.json, which has no architecture but in `auto_map`.
LLAMA3V = {
    "_name_or_path": "mustafaaljadery/llama3v", "model_type": "llama3v", "architectures": None, "version": None,
    "batch_vision_input": None, "drop_vision_last_layer": None,
    "auto_map": {"AutoConfig": "config.Config", "AutoModelForCausalLM": "modeling_llama3v.Llama3v"},
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "MiniCPMVImageProcessor", "processor_class": "MiniCPMVProcessor", "im_start": "<image>",
    "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>", "unk": "<unk>", "slice_mode": True,
    "use_image_id": False, "norm_mean": [0.5, 0.5, 0.5], "norm_std": [0.5, 0.5, 0.5], "version": 2.5,
}  # fmt: skip

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a tiny checkpoint is made of.

    `side`: rows of the square position table; `area_px`: what `scale_resolution` says; `processor`: whether there is a
    preprocessor_config.json, as in later revisions; `llama3v`: whether names and config are those of Llama 3-V;
    `quiet`: whether what the resampler's norms read is so small that their epsilon shows.
    """

    side: int = 5
    area_px: int = 56
    most: int = 9
    queries: int = 4
    heads: int = 1
    processor: bool = False
    llama3v: bool = False
    quiet: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return 128 * self.heads


class Resampler(torch.nn.Module):
    """One attention of learned queries over a picture's patches; positions are added to the keys alone."""

    def __init__(self, variant: Variant, hidden: int) -> None:
        super().__init__()
        width = variant.width
        self.query = torch.nn.Parameter(torch.zeros(variant.queries, width))
        self.kv_proj = torch.nn.Linear(hidden, width, bias=False)
        self.attn = torch.nn.MultiheadAttention(width, width // 128)
        self.ln_q, self.ln_kv, self.ln_post = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = torch.nn.Parameter(torch.zeros(width, width))

    def forward(self, states_ND: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        x_ND = self.ln_kv(self.kv_proj(states_ND))
        keys_ND = x_ND + torch.from_numpy(grid_positions(rows, columns, x_ND.shape[1]))
        made_QD, _ = self.attn(self.ln_q(self.query), keys_ND, x_ND)
        return self.ln_post(made_QD) @ self.proj


def grid_positions(rows: int, columns: int, width: int) -> NDArray[np.float32]:
    """[rows * columns, width]: sine and cosine of the column, then of the row, patch by patch."""
    quarter = width // 4
    wave = [1 / 10000 ** (k / quarter) for k in range(quarter)]
    return np.array(
        [
            [part(place * w) for place in (column, row) for part in (math.sin, math.cos) for w in wave]
            for row in range(rows)
            for column in range(columns)
        ],
        np.float32,
    )


class Reference(torch.nn.Module):
    """The model under its own names: `vpm`, `resampler`, `llm`."""

    def __init__(self, variant: Variant, llm: transformers.LlamaConfig) -> None:
        super().__init__()
        vision = Idefics2VisionConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, patch_size=PATCH_PX,
            image_size=variant.side * PATCH_PX,
        )  # fmt: skip
        self.variant = variant
        self.vpm = Idefics2VisionTransformer._from_config(vision, attn_implementation="eager")
        self.resampler = Resampler(variant, vision.hidden_size)
        self.llm = transformers.LlamaForCausalLM(llm)

    @torch.no_grad()
    def rows(self, pixels_CHW: torch.Tensor) -> torch.Tensor:
        """The embeddings of one slice, alone: [queries, width]. The tower sees its patches as one row."""
        rows, columns = (size // PATCH_PX for size in pixels_CHW.shape[1:])
        patches = pixels_CHW.unfold(1, PATCH_PX, PATCH_PX).unfold(2, PATCH_PX, PATCH_PX)  # [3, rows, columns, 14, 14]
        strip_CHW = torch.cat([patches[:, i // columns, i % columns] for i in range(rows * columns)], dim=2)
        states_TND = self.vpm(strip_CHW[None]).last_hidden_state
        return self.resampler(states_TND[0], rows, columns)

    @torch.no_grad()
    def embed(self, image_HWC: Array) -> torch.Tensor:
        """The embeddings of a picture, overview first."""
        return torch.cat([self.rows(pixels(piece)) for piece in cut(image_HWC, self.variant)[0]])

    def embeds_of(self, tokenizer: Any, ids: list[int], images: list[Array]) -> torch.Tensor:
        """The decoder's input: embeddings of pictures in the places of `<unk>`."""
        where = torch.tensor(ids) == tokenizer.convert_tokens_to_ids("<unk>")
        made_ND = self.llm.get_input_embeddings()(torch.tensor(ids)).detach().clone()
        if images:
            made_ND[where] = torch.cat([self.embed(image) for image in images])
        return made_ND[None]


def pixels(piece: Image.Image) -> torch.Tensor:
    """What torchvision's `ToTensor` and `Normalize` make of a picture: float32 [3, H, W]."""
    image_CHW = torch.from_numpy(np.array(piece)).permute(2, 0, 1).contiguous()
    return (image_CHW.to(torch.float32).div(255) - 0.5) / 0.5


def cut(image_HWC: Array, variant: Variant) -> tuple[list[Image.Image], tuple[int, int]]:
    """(overview and slices, (columns, rows) of the grid or (0, 0)), by the rule of LLaVA-UHD."""
    return cut_picture(Image.fromarray(image_HWC), variant)


def cut_picture(picture: Any, variant: Variant) -> tuple[list[Any], tuple[int, int]]:
    """The same of anything that can be resized and cropped as Pillow's pictures can."""
    (width, height), area = picture.size, variant.area_px**2
    wanted = min(math.ceil(width * height / area), variant.most)
    overview = picture.resize(_shaped(width, height, variant.area_px), Image.Resampling.BICUBIC)
    if wanted <= 1:
        return [overview], (0, 0)
    best, grid = math.inf, (1, 1)
    for count in {wanted - 1: None, wanted: None, wanted + 1: None}:
        if count == 1 or count > variant.most:
            continue
        for columns in range(1, count + 1):
            rows, rest = divmod(count, columns)
            error = abs(math.log(width / height) - math.log(columns / rows)) if not rest else math.inf
            if error < best:
                best, grid = error, (columns, rows)
    columns, rows = grid
    wide, high = _shaped(_whole(width, columns) / columns, _whole(height, rows) / rows, variant.area_px)
    large = picture.resize((wide * columns, high * rows), Image.Resampling.BICUBIC)
    boxes = [(x * wide, y * high, (x + 1) * wide, (y + 1) * high) for y in range(rows) for x in range(columns)]
    return [overview, *(large.crop(box) for box in boxes)], grid


def _shaped(width: float, height: float, area_px: int) -> tuple[int, int]:
    ratio = width / height
    high = int(area_px / math.sqrt(ratio))
    return _whole(int(high * ratio), PATCH_PX), _whole(high, PATCH_PX)


def _whole(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


def prompt(variant: Variant, question: str, images: list[Array]) -> str:
    """A user's message: a placeholder for each picture, then the question, each on a line of its own."""
    one = "<image>" + "<unk>" * variant.queries + "</image>"
    lines = []
    for image in images:
        columns, rows = cut(image, variant)[1]
        grid = "<slice>" + "\n".join([one * columns] * rows) + "</slice>" if rows else ""
        lines.append(one + grid)
    return "\n".join([*lines, question])


def ids_of(tokenizer: Any, variant: Variant, question: str, images: list[Array]) -> list[int]:
    """The whole prompt as token ids."""
    messages = [{"role": "user", "content": prompt(variant, question, images)}]
    return list(tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=True, return_dict=False))


_made = tempfile.TemporaryDirectory(prefix="edgevlm-tiny-minicpm-")


@functools.cache
def shared(variant: Variant) -> tuple[Path, Reference, Any]:
    """(folder, model, tokenizer) of a checkpoint, made once for all tests. Read-only."""
    folder = Path(tempfile.mkdtemp(dir=_made.name)) / "checkpoint"
    return folder, *write(folder, variant)


def copy(variant: Variant, folder: Path) -> Path:
    """A copy of a checkpoint that may be changed."""
    return Path(shutil.copytree(shared(variant)[0], folder))


def write(folder: Path, variant: Variant) -> tuple[Reference, Any]:
    """Write a checkpoint; returns the model (float32, evaluation mode) and the tokenizer."""
    torch.manual_seed(13)
    tokenizer = tiny.make_tokenizer("llama-bpe")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    llm = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=variant.width, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Reference(variant, llm).eval()
    tiny.randomize(model)
    with torch.no_grad():
        model.resampler.query.normal_(0, 1)
        for name, parameter in model.named_parameters():  # a learned norm is not named `norm` here
            if ".ln_" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        if variant.quiet:
            read = model.resampler.query, model.resampler.kv_proj.weight, *model.resampler.attn.out_proj.parameters()
            for parameter in read:
                parameter.mul_(0.003)
        for parameter in model.parameters():  # what the checkpoint can hold
            parameter.copy_(parameter.to(variant.dtype).to(torch.float32))
    folder.mkdir(parents=True)
    names = {"vpm.": "vison.", "resampler.": "projection."} if variant.llama3v else {}
    tensors = {_renamed(name, names): tensor.to(variant.dtype) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model, variant)))
    if variant.processor:
        sizes = {"max_slice_nums": variant.most, "scale_resolution": variant.area_px, "patch_size": PATCH_PX}
        sizes["image_feature_size"] = variant.queries
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | sizes))
    tiny.write_texts(folder, tokenizer)
    (folder / "chat_template.jinja").unlink()
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "chat_template": TEMPLATE})
    return model, tokenizer


def _config(model: Reference, variant: Variant) -> dict[str, Any]:
    llm, vision = model.llm.config, model.vpm.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    plain = {key: getattr(llm, key) for key in (*sizes, "num_key_value_heads", "vocab_size", "max_position_embeddings",
                                                "rms_norm_eps", "bos_token_id", "eos_token_id")}  # fmt: skip
    config = {
        **RELEASED,
        **plain,
        "rope_theta": 500000.0,
        "patch_size": PATCH_PX,
        "query_num": variant.queries,
        "slice_config": {
            "max_slice_nums": variant.most, "patch_size": PATCH_PX, "model_type": "minicpmv",
            "scale_resolution": variant.area_px,
        },
        "vision_config": {key: getattr(vision, key) for key in (*sizes, "image_size", "patch_size")}
        | {"model_type": "idefics2"},
        **(LLAMA3V if variant.llama3v else {}),
    }  # fmt: skip
    return {key: value for key, value in config.items() if value is not None or key == "rope_scaling"}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
