"""Towers of their published sizes, with random weights, against transformers on photographs: by hand, not in CI.

    python tests/check_real_size.py [--towers clip-l14-336 siglip-b16-512 siglip-so400m-384] [--forms int8 int4]

A whole LLaVA checkpoint with a tiny language model is written and converted as fp32, fp16, int8 and int4. Compared are
the pixels (to the last bit), the embeddings of fp32 with those of transformers, and of the other forms with fp32, which
is therefore made whatever forms are asked for.
Several minutes and 7 GB of disk for each tower; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import tiny
import torch
import transformers
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

import edgevlm
from edgevlm.converters.verify import cosines, relative_error

TOWERS: dict[str, dict[str, Any]] = {
    "clip-l14-336": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                     "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    "siglip-b16-512": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                       "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
    "siglip-so400m-384": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                          "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
}  # fmt: skip
FORMS = ("fp32", "fp16", "int8", "int4")


def photographs() -> dict[str, NDArray[np.uint8]]:
    china, flower = load_sample_images().images
    return {
        "china": china, "flower": flower, "astronaut": skimage.data.astronaut(), "coffee": skimage.data.coffee(),
        "chelsea": skimage.data.chelsea(), "rocket": skimage.data.rocket(), "tall": china[:, 200:330],
    }  # fmt: skip


def write_checkpoint(folder: Path, name: str) -> transformers.LlavaForConditionalGeneration:
    """Weights as transformers initialises these towers: nobody chose them to be easy."""
    torch.manual_seed(0)
    sizes, clip = TOWERS[name], name.startswith("clip")
    kind = transformers.CLIPVisionConfig if clip else transformers.SiglipVisionConfig
    tokenizer = tiny.make_tokenizer("llama-bpe")
    variant = tiny.Variant()
    positions = (sizes["image_size"] // sizes["patch_size"]) ** 2
    config = transformers.LlavaConfig(
        vision_config=kind(**sizes),
        text_config=tiny._text(variant, len(tokenizer), tokenizer),
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        image_token_index=tokenizer.convert_tokens_to_ids(tiny.IMAGE_TOKEN),
        image_seq_length=positions,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    side = {"height": sizes["image_size"], "width": sizes["image_size"]}
    if clip:
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": sizes["image_size"]}, crop_size=side)
    else:
        processor = transformers.SiglipImageProcessor(size=side)
    processor.save_pretrained(folder)
    tiny.write_texts(folder, tokenizer)
    return model


def check(name: str, folder: Path, forms: list[str]) -> list[str]:
    """The table's rows of one tower, in the order of `FORMS`; that of fp32 in any case."""
    model = write_checkpoint(folder / "checkpoint", name)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "checkpoint", backend="pil")
    pictures = photographs()
    pixels = {key: processor(image, return_tensors="pt")["pixel_values"] for key, image in pictures.items()}
    with torch.inference_mode():
        reference = {
            key: model.get_image_features(pixels[key]).pooler_output[0].reshape(-1, 64).numpy() for key in pictures
        }
    del model
    gc.collect()
    rows, exact = [], reference
    for form in (each for each in FORMS if each == "fp32" or each in forms):
        started = time.monotonic()
        out = folder / form
        options = {"decoder_quant": "f16", "encoder_quant": form, "fidelity_tokens": 0, "force": True}
        cost = edgevlm.convert(folder / "checkpoint", out, **options).fidelity["encoder"]
        seconds = time.monotonic() - started
        with edgevlm.load(out) as bundle:
            for key, image in pictures.items():
                assert np.array_equal(bundle.preprocess(image), pixels[key].numpy()), f"{key}: pixels differ"
            found = {key: bundle.embed_image(image) for key, image in pictures.items()}
        cosine = np.concatenate([cosines(exact[key][None], found[key][None])[0] for key in pictures])
        error = relative_error(np.stack([*exact.values()]), np.stack([*found.values()]))
        size = (out / "encoder.onnx.data").stat().st_size / 1e6
        against = "transformers" if form == "fp32" else "fp32"
        smoothed = f"{cost['smoothed']} of {cost['products']}" if "smoothed" in cost else ""
        floats = len(cost.get("in_float32", []))
        rows.append(
            f"| {name} | {form} | {size:.0f} | {against} | {cosine.mean():.6f} / {cosine.min():.6f} | {error:.2g} | "
            f"{smoothed} | {floats or ''} | {seconds:.0f} |"
        )
        print(rows[-1], flush=True)
        if form == "fp32":
            exact = found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    arguments = parser.parse_args()
    print("| tower | form | MB | against | cosine, mean / min | error | smoothed | in float32 | s |\n"
          "|---|---|---:|---|---|---:|---|---:|---:|")  # fmt: skip
    for name in arguments.towers:
        with tempfile.TemporaryDirectory() as folder:
            check(name, Path(folder), arguments.forms)


if __name__ == "__main__":
    main()
