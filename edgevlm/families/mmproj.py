"""llama.cpp's `mmproj` files: keys and names of tensors, for all families. Declarations only.

Readers of the format: llama.cpp's `tools/mtmd/clip.cpp` and `clip-impl.h`; writers: `conversion/` and
`tools/mtmd/legacy-models/`.
"""

from edgevlm.families.parts import (
    CLIP,
    CLIP_PROCESSOR,
    IDEFICS3,
    IDEFICS3_PROCESSOR,
    LINEAR,
    MM_MLP,
    SIGLIP,
    SIGLIP_PROCESSOR,
)
from edgevlm.families.schema import REQUIRED, Keys, Mmproj, Part, Weight

#: Keys that any such file may have. `projection_dim` means three things, so shapes count.
KEYS = Keys(
    read={
        "clip.projector_type": None,
        "clip.vision.projector_type": None,
        "clip.vision.image_size": REQUIRED,
        "clip.vision.patch_size": REQUIRED,
        "clip.vision.embedding_length": REQUIRED,
        "clip.vision.feed_forward_length": None,
        "clip.vision.block_count": REQUIRED,
        "clip.vision.attention.head_count": REQUIRED,
        "clip.vision.attention.head_count_kv": None,
        "clip.vision.attention.head_dim": None,
        "clip.vision.attention.layer_norm_epsilon": REQUIRED,
        "clip.vision.image_mean": REQUIRED,
        "clip.vision.image_std": REQUIRED,
        "clip.use_gelu": False,
        "clip.use_silu": False,
    },
    fixed={
        "clip.has_vision_encoder": (True,),
        "clip.has_audio_encoder": (False, None),
        "clip.has_text_encoder": (False, None),
        "clip.has_llava_projector": (None, True, False),
        "clip.has_minicpmv_projector": (None, False),
    },
    ignored=("clip.vision.projection_dim",),
)

#: Our names of a tower's weights -> those of the file. `ffn_up` and `ffn_down` are the other way round in old files.
TENSORS = {
    "class.weight": "v.class_embd",
    "patch.weight": "v.patch_embd.weight",
    "patch.bias": "v.patch_embd.bias",
    "position.weight": "v.position_embd.weight",
    "pre_norm.weight": "v.pre_ln.weight",
    "pre_norm.bias": "v.pre_ln.bias",
    "post_norm.weight": "v.post_ln.weight",
    "post_norm.bias": "v.post_ln.bias",
    "blk.{i}.ln1.weight": "v.blk.{i}.ln1.weight",
    "blk.{i}.ln1.bias": "v.blk.{i}.ln1.bias",
    "blk.{i}.ln2.weight": "v.blk.{i}.ln2.weight",
    "blk.{i}.ln2.bias": "v.blk.{i}.ln2.bias",
    "blk.{i}.q.weight": "v.blk.{i}.attn_q.weight",
    "blk.{i}.q.bias": "v.blk.{i}.attn_q.bias",
    "blk.{i}.k.weight": "v.blk.{i}.attn_k.weight",
    "blk.{i}.k.bias": "v.blk.{i}.attn_k.bias",
    "blk.{i}.v.weight": "v.blk.{i}.attn_v.weight",
    "blk.{i}.v.bias": "v.blk.{i}.attn_v.bias",
    "blk.{i}.o.weight": "v.blk.{i}.attn_out.weight",
    "blk.{i}.o.bias": "v.blk.{i}.attn_out.bias",
    "blk.{i}.fc1.weight": "v.blk.{i}.ffn_up.weight",
    "blk.{i}.fc1.bias": "v.blk.{i}.ffn_up.bias",
    "blk.{i}.fc2.weight": "v.blk.{i}.ffn_down.weight",
    "blk.{i}.fc2.bias": "v.blk.{i}.ffn_down.bias",
}

# What the converter for LLaVA 1.6 writes as well; its tiles of many shapes cannot be run.
_LLAVA_FIXED = {
    "clip.vision.mm_patch_merge_type": (None, "flat"),
    "clip.vision.image_grid_pinpoints": (None, []),
    "clip.vision.mm_projector_type": (None, "mlp2x_gelu", "linear"),
}
_LLAVA_IGNORED = ("clip.vision.image_crop_resolution", "clip.vision.image_split_resolution")
_LLAVA_KEYS = Keys(
    read={"clip.vision.feature_layer": None, "clip.vision.image_aspect_ratio": None},
    fixed=_LLAVA_FIXED,
    ignored=_LLAVA_IGNORED,
)
# LLaVA selects the state before the last block, `hidden_states[-2]`.
_WHOLE_TOWER = {1024: 24, 1152: 27, 1280: 32}
# The converter of these files says `use_gelu` for the exact form, which Hugging Face calls `gelu`.
_CLIP_ACTIVATIONS = {"": "quick_gelu", "use_gelu": "gelu"}

#: LLaVA 1.5 and LLaVA++. LLaVA's own code pads pictures to squares.
LLAVA_MLP = Mmproj(
    projector="mlp",
    tower=CLIP,
    connector=MM_MLP,
    connector_prefixes=("mm.",),
    processor=CLIP_PROCESSOR,
    layer_norm_eps=1e-5,
    activations=_CLIP_ACTIVATIONS,
    keys=_LLAVA_KEYS,
    config={"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
    config_keys={"image_aspect_ratio": "clip.vision.image_aspect_ratio"},
    drops_last=True,
    whole_tower=_WHOLE_TOWER,
    unused=("v.post_ln.*",),
)
#: LLaVA 1.0. Its code leaves pictures to the processor, which crops.
LLAVA_LINEAR = Mmproj(
    projector="mlp",
    tower=CLIP,
    connector=LINEAR,
    connector_prefixes=("mm.0.", "mm."),
    processor=CLIP_PROCESSOR,
    layer_norm_eps=1e-5,
    activations=_CLIP_ACTIVATIONS,
    keys=_LLAVA_KEYS,
    config_keys={"image_aspect_ratio": "clip.vision.image_aspect_ratio"},
    drops_last=True,
    whole_tower=_WHOLE_TOWER,
    unused=("v.post_ln.*",),
)
#: The same with a SigLIP tower, of which every model has the tanh form whatever the converter wrote.
LLAVA_SIGLIP = Mmproj(
    projector="mlp",
    tower=SIGLIP,
    connector=MM_MLP,
    connector_prefixes=("mm.",),
    processor=SIGLIP_PROCESSOR,
    layer_norm_eps=1e-6,
    activations={"": "gelu_pytorch_tanh", "use_gelu": "gelu_pytorch_tanh"},
    keys=Keys(
        read={"clip.vision.feature_layer": None},
        fixed={**_LLAVA_FIXED, "clip.vision.image_aspect_ratio": (None, "square")},
        ignored=_LLAVA_IGNORED,
    ),
    config={"vision_feature_select_strategy": "full"},
    drops_last=True,
    whole_tower=_WHOLE_TOWER,
    unused=("v.post_ln.*", "v.head.*"),
    assumes="the mmproj does not say how pictures become square; they are stretched, as SigLIP's processor does",
)
#: SmolVLM and SmolVLM2. Whether the processor splits pictures is not in the file; that of every Instruct model does.
IDEFICS3_MMPROJ = Mmproj(
    projector="idefics3",
    tower=IDEFICS3,
    connector=Part(
        kind="pixel_shuffle",
        keys=Keys(),
        weights={"weight": Weight("fc1.weight", ("n_embd", "features"))},
    ),
    connector_prefixes=("mm.model.fc.",),
    processor=IDEFICS3_PROCESSOR,
    layer_norm_eps=1e-6,
    activations={"use_gelu": "gelu_pytorch_tanh"},
    keys=Keys(read={"clip.vision.projector.scale_factor": REQUIRED, "clip.vision.preproc_image_size": None}),
    config_keys={"scale_factor": "clip.vision.projector.scale_factor"},
)
