"""Llama 3-V: MiniCPM-Llama3-V 2.5 under other names, and converted as that. Declarations only.

Its config.json is sparse: no architecture but in `auto_map`, nothing about tower and slices, which are MiniCPM's.
"""

from edgevlm.families.minicpmv import MINICPMV_CONFIG, MINICPMV_IGNORED, MINICPMV_SWITCHES, MINICPMV_VISION
from edgevlm.families.parts import LLAMA
from edgevlm.families.schema import Family, Keys, Origin, Published

FAMILY = Family(
    name="llama3v",
    hf_architectures=("Llama3v",),
    keys=Keys(
        read={"vision_config": {}, "slice_config": {}, "patch_size": 14},
        fixed=MINICPMV_SWITCHES,
        ignored=MINICPMV_IGNORED,
    ),
    text_section=None,
    decoder=LLAMA,
    decoder_model_types=("llama3v",),
    decoder_prefixes=("llm.model.",),
    head_prefixes=("llm.lm_head.",),
    origin=Origin(
        model="MiniCPM-Llama3-V 2.5, built with Llama 3",
        repository="openbmb/MiniCPM-Llama3-V-2_5",
        notice="Llama 3-V (mustafaaljadery/llama3v) is MiniCPM-Llama3-V 2.5 by OpenBMB with renamed code and tensors "
        "and a little noise on the weights; its authors withdrew it in June 2024, and no valid licence was published",
    ),
    vision=MINICPMV_VISION,
    title="Llama 3-V, which is MiniCPM-Llama3-V 2.5",
    published=(
        Published(
            name="Llama 3-V",
            repositories=("mustafaaljadery/llama3v",),
            licence="none that is valid; withdrawn by its authors",
            config={**MINICPMV_CONFIG, "model_type": "llama3v"},
            processor={},
        ),
    ),
)
