"""MiniCPM-Llama3-V 2.5: SigLIP for slices of any shape, a resampler, Llama 3. Declarations only.

After the code in its own repository; transformers has no class for it. The decoder's keys lie at config.json's top.
"""

from edgevlm.families.parts import BOOKKEEPING, LLAMA, OLD_BOOKKEEPING, SIGLIP_WEIGHTS
from edgevlm.families.published import LLAMA_3_8B
from edgevlm.families.schema import REQUIRED, Family, Keys, Origin, Part, Processor, Published, Tower, Vision, Weight
from edgevlm.spec import TileTexts

# The defaults are the sizes of siglip-so400m-14-980: what does not name them has that tower.
IDEFICS2 = Tower(
    kind="siglip_strip",
    model_type="idefics2",
    aliases=("idefics2_vision", ""),
    class_token=0,
    keys=Keys(
        read={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
        },
        fixed={"num_channels": (3,)},
        ignored=(*BOOKKEEPING, *OLD_BOOKKEEPING, "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
    ),
    weights=SIGLIP_WEIGHTS,
    unused=("embeddings.position_ids",),
)

RESAMPLER = Part(
    kind="resampler",
    keys=Keys(read={"query_num": 64}),
    weights={
        "query": Weight("query", ("queries", "n_embd")),
        "kv_proj.weight": Weight("kv.weight", ("n_embd", "hidden")),
        "attn.in_proj_weight": Weight("qkv.weight", ("n_embd_x3", "n_embd")),
        "attn.in_proj_bias": Weight("qkv.bias", ("n_embd_x3",)),
        "attn.out_proj.weight": Weight("o.weight", ("n_embd", "n_embd")),
        "attn.out_proj.bias": Weight("o.bias", ("n_embd",)),
        "ln_q.weight": Weight("ln_q.weight", ("n_embd",)),
        "ln_q.bias": Weight("ln_q.bias", ("n_embd",)),
        "ln_kv.weight": Weight("ln_kv.weight", ("n_embd",)),
        "ln_kv.bias": Weight("ln_kv.bias", ("n_embd",)),
        "ln_post.weight": Weight("ln_post.weight", ("n_embd",)),
        "ln_post.bias": Weight("ln_post.bias", ("n_embd",)),
        "proj": Weight("proj", ("n_embd", "n_embd")),  # multiplied from the right: inputs come first
    },
    unused=("pos_embed",),  # computed for the grid at hand; some files store the one of 70 x 70
)

SLICING_PROCESSOR = Processor(
    names=("MiniCPMVImageProcessor",),
    keys=Keys(
        read={
            "max_slice_nums": 9,
            "scale_resolution": 448,
            "patch_size": 14,
            "image_feature_size": 64,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
        },
        fixed={
            "slice_mode": (True,),
            "use_image_id": (False,),
            "im_start": ("<image>",),
            "im_end": ("</image>",),
            "slice_start": ("<slice>",),
            "slice_end": ("</slice>",),
            "unk": ("<unk>",),
        },
        ignored=("image_processor_type", "processor_class", "auto_map", "im_id_start", "im_id_end", "version"),
    ),
)

# What MiniCPM's own code adds to a Llama's keys. It reads the sizes of slices from their own section; `image_size` is
# that of nothing.
MINICPMV_SWITCHES = {
    "slice_mode": (True,),
    "drop_vision_last_layer": (False,),
    "mm_use_im_start_end": (True,),
    "use_image_id": (False,),
    "version": ("2.5", 2.5),
}
MINICPMV_IGNORED = (*OLD_BOOKKEEPING, "batch_vision_input", "image_size")
MINICPMV_CONFIG = {
    **LLAMA_3_8B,
    "model_type": "minicpmv",
    "query_num": 96,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14},
    "vision_config": {
        "model_type": "idefics2", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 980,
    },
}  # fmt: skip
MINICPMV_VISION = Vision(
    section="vision_config",
    processors=(SLICING_PROCESSOR,),
    towers=(IDEFICS2,),
    # of the published copies: MiniCPM's own, and Llama 3-V's new names for the same tensors
    tower_prefixes=("vpm.", "vison."),
    connector=RESAMPLER,
    connector_prefixes=("resampler.", "projection."),
    feature_layer=-1,
    feature_strategy="full",
    post_norm=True,
    image_token=(),
    tile_texts=TileTexts(
        whole="<image>",
        end="</image>",
        whole_first=True,
        grid_start="<slice>",
        tile="<image>",
        tile_end="</image>",
        row_end="",
        between_rows="\n",
        grid_end="</slice>",
    ),
    control_tokens=("<image>", "</image>", "<slice>", "</slice>"),
    slices="slice_config",
    slice_keys=Keys(
        read={"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14},
        ignored=(*BOOKKEEPING, *OLD_BOOKKEEPING),
    ),
    between_parts="\n",
)

FAMILY = Family(
    name="minicpmv",
    hf_architectures=("MiniCPMV",),
    keys=Keys(
        read={"vision_config": REQUIRED, "slice_config": {"max_slice_nums": 1}, "patch_size": 14},
        fixed=MINICPMV_SWITCHES,
        ignored=MINICPMV_IGNORED,
    ),
    text_section=None,
    decoder=LLAMA,
    decoder_model_types=("minicpmv",),
    decoder_prefixes=("llm.model.",),
    head_prefixes=("llm.lm_head.",),
    origin=Origin(model="MiniCPM-Llama3-V 2.5, built with Llama 3", repository="openbmb/MiniCPM-Llama3-V-2_5"),
    vision=MINICPMV_VISION,
    title="MiniCPM-Llama3-V 2.5",
    published=(
        Published(
            name="MiniCPM-Llama3-V 2.5",
            repositories=("openbmb/MiniCPM-Llama3-V-2_5",),
            licence="MiniCPM Model License (registration for commercial use), on top of Llama 3's",
            config=MINICPMV_CONFIG,
            processor={},
        ),
    ),
)
