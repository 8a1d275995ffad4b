"""How much memory the conversion of vision models takes: real towers with random weights, by hand, not in CI.

    python tests/check_convert_memory.py [--models llava-clip-l14-336 smolvlm-256m] [--forms int8 fp32] [-- OPTION...]

Each checkpoint is written once (2 GB of disk) and converted by `edgevlm convert` in a process of its own. What follows
`--` goes to every conversion. Prints a table in Markdown; the peaks are those of `bench_convert.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path

import bench_convert
import tiny
import tiny_smolvlm
import torch
import transformers

FORMS = ("int8", "fp32", "fp16", "int4")


def write_llava(folder: Path) -> None:
    """LLaVA 1.5, its tower and projector of their size, in float16 as published, with one block of a language model."""
    tokenizer = tiny.make_tokenizer("llama-bpe")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=1024, num_hidden_layers=1,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_index=tokenizer.convert_tokens_to_ids(tiny.IMAGE_TOKEN),
        image_seq_length=576,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).to(torch.float16).save_pretrained(folder)
    side = {"height": 336, "width": 336}
    transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side).save_pretrained(folder)
    tiny.write_texts(folder, tokenizer)


def write_smolvlm(folder: Path) -> None:
    """SmolVLM-256M: SigLIP-B/16 at 512 pixels, 30 blocks of width 576, bfloat16; the vocabulary is mostly padding."""
    tokenizer = tiny_smolvlm.make_tokenizer(rows=True)
    config = transformers.SmolVLMConfig(
        vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                       "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
        text_config={"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
                     "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        image_token_id=tokenizer.convert_tokens_to_ids(tiny_smolvlm.IMAGE),
        scale_factor=4,
    )  # fmt: skip
    transformers.SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_smolvlm.SmolVLMImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(tiny_smolvlm.TEMPLATE, encoding="utf-8")


MODELS = {"llava-clip-l14-336": write_llava, "smolvlm-256m": write_smolvlm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--forms", nargs="+", default=["int8", "fp32"], choices=FORMS)
    parser.add_argument("options", nargs="*", help="for `edgevlm convert`")
    arguments = parser.parse_args()
    print("| model | encoder | seconds | peak, MB | own memory | mapped files |\n|---|---|---:|---:|---:|---:|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "out"
            # In a process of its own, whose memory then does not count against the machine's while others are measured.
            writer = multiprocessing.get_context("spawn").Process(target=MODELS[name], args=(checkpoint,))
            writer.start()
            writer.join()
            for form in arguments.forms:
                command = [sys.executable, "-m", "edgevlm", "convert", str(checkpoint), str(out), "--force",
                           "--encoder-quant", form, *arguments.options]  # fmt: skip
                run = bench_convert.measure(command)
                figures = (run.seconds, run.peak / 1e6, run.own / 1e6, run.mapped / 1e6)
                print(f"| {name} | {form} | {' | '.join(f'{figure:.0f}' for figure in figures)} |", flush=True)
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
