"""Text-only models: the logits of transformers, a bundle without an encoder, and what a picture gets from it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_text
import torch
from test_convert import LOGIT_TOLERANCE, exact_logits
from tiny_text import VARIANTS

import edgevlm
from edgevlm import families
from edgevlm.bundle import open_bundle
from edgevlm.converters import convert, gguf_decoder
from edgevlm.converters.mapping import map_tensors, wanted_leaves
from edgevlm.converters.resolve import resolve
from edgevlm.converters.safetensors import Tensor
from edgevlm.errors import CapabilityError, CheckpointError
from edgevlm.gguf import read_header
from edgevlm.splice import TextSegment


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """(bundle, model, variant), with nothing lost to quantization."""
    variant = VARIANTS[request.param]
    folder, model = tiny_text.shared(variant)
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="f32")
    return open_bundle(out), model, variant


def test_texts_give_the_logits_of_transformers(converted):
    """200 positions: a wrong rotary scaling shows only far from the start."""
    bundle, model, _ = converted
    ids = tuple(map(int, np.random.default_rng(1).integers(0, 400, 200)))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    path = bundle.path("decoder")
    assert np.abs(exact_logits(path, [TextSegment(ids)]) - wanted).max() <= LOGIT_TOLERANCE
    # The twin: two tokens of the middle exchanged, which only their positions can tell.
    swapped = (*ids[:100], ids[101], ids[100], *ids[102:])
    assert np.abs(exact_logits(path, [TextSegment(swapped)]) - wanted).max() > LOGIT_TOLERANCE


def test_the_bundle_holds_a_decoder_and_nothing_else(converted):
    bundle, _, variant = converted
    assert sorted(path.name for path in bundle.folder.iterdir()) == ["bundle.json", "decoder.gguf"]
    assert bundle.spec.family == variant.kind
    assert (bundle.spec.image, bundle.spec.encoder, bundle.spec.prompt.image_token) == (None, None, None)
    header = read_header(bundle.path("decoder"))
    names = {tensor.name for tensor in header.tensors}
    assert ("rope_freqs.weight" in names) is (variant.rope == "llama3")
    assert ("output.weight" in names) is not variant.tied
    assert header.metadata["llama.context_length"] == (variant.window or 512)
    adds_bos = variant.tokenizer in ("llama-bpe", "deepseek-llm", "spm")
    assert header.metadata["tokenizer.ggml.add_bos_token"] is adds_bos
    assert header.metadata["tokenizer.ggml.pre"] == ("default" if variant.tokenizer == "spm" else variant.tokenizer)


def test_a_bundle_that_knows_text_only_answers_and_refuses_pictures(converted):
    bundle, _, _ = converted
    with edgevlm.load(bundle.folder, context=128) as model:
        answer = model.ask("The gauge?", max_tokens=4)
        assert 1 <= answer.usage.completion_tokens <= 4
        assert answer.usage.image_tokens == 0
        with pytest.raises(CapabilityError) as caught:
            model.ask("What is this?", images=[np.zeros((8, 8, 3), np.uint8)])
        assert caught.value.code == "capability.no_vision"


def test_the_command_line_asks_it(tmp_path):
    folder, _ = tiny_text.shared(VARIANTS["Llama 3.2"])
    ask = [sys.executable, "-m", "edgevlm", "ask", "-m", "text", "--max-tokens", "3", "--context", "128"]
    runs = [
        [sys.executable, "-m", "edgevlm", "convert", str(folder), "text", "--decoder-quant", "q8_0"],
        [*ask, "--json", "Hello"],
        [*ask, "-i", "x.png", "Hello"],
    ]
    (tmp_path / "x.png").write_bytes(b"never opened")
    done = [subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120) for run in runs]
    assert [run.returncode for run in done] == [0, 0, 1], done
    assert json.loads(done[1].stdout)["usage"]["image_tokens"] == 0
    assert "[capability.no_vision]" in done[2].stderr


def test_the_window_of_mistral_is_where_full_attention_ends(tmp_path):
    """Up to the window the logits agree (above); beyond, transformers sees less, so that no more may be promised."""
    folder, model = tiny_text.shared(VARIANTS["Mistral with a window"])
    convert(folder, tmp_path / "out", decoder_quant="f32")
    ids = tuple(map(int, np.random.default_rng(3).integers(0, 400, 256)))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    found = exact_logits(tmp_path / "out" / "decoder.gguf", [TextSegment(ids)])
    assert np.abs(found - wanted).max() <= LOGIT_TOLERANCE
    model.config.sliding_window = 255
    with torch.no_grad():
        narrow = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(found - narrow).max() > LOGIT_TOLERANCE


# published configurations, as the models' own config.json have them

_LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
_1B = {"head_dim": 64, "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 16}
_3B = {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28}
#: config.json, tensors of the GGUF file, and of its rope factors: leading ones, trailing factors, those between.
PUBLISHED = {
    "1B": (_LLAMA32 | _1B, 147, (15, 14, [1.651329, 3.292262, 9.666729])),
    "3B": (_LLAMA32 | _3B, 255, (29, 29, [1.234937, 1.651329, 2.276660, 3.292262, 5.171596, 9.666729])),
    "factor 8, narrow": (
        _LLAMA32 | _1B | {"rope_scaling": {**_LLAMA32["rope_scaling"], "factor": 8.0}}, 147,
        (15, 14, [1.553415, 2.694530, 5.257327]),
    ),
    "factor 8, wide": (
        _LLAMA32 | _3B | {"rope_scaling": {**_LLAMA32["rope_scaling"], "factor": 8.0}}, 255,
        (29, 29, [1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327]),
    ),
}  # fmt: skip


def _respelled(config):
    """As transformers 5 writes it."""
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return {**rest, "dtype": "bfloat16", "pad_token_id": None,
            "rope_parameters": {**config["rope_scaling"], "rope_theta": config["rope_theta"]}}  # fmt: skip


def _plan(config):
    """The tensors of the GGUF file for a checkpoint whose weights are zeros that take no memory."""
    family = families.find(config["architectures"])
    resolved = resolve(family, config, None, {}, name="x")
    leaves = wanted_leaves(family.decoder.weights, resolved.spec.decoder.layers, resolved.sizes)
    shapes = {f"model.{leaf}": tuple(resolved.sizes[s] for s in weight.shape) for leaf, (_, weight) in leaves.items()}
    tensors = {
        name: Tensor(name, "BF16", shape, np.broadcast_to(np.uint16(0), shape)) for name, shape in shapes.items()
    }
    sources = gguf_decoder.sources(map_tensors(family, resolved, tensors))
    return resolved, gguf_decoder.plan(sources, resolved, dict.fromkeys(sources, "BF16"))


@pytest.mark.parametrize("spelling", [dict, _respelled], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_llama_3_2_as_published(name, spelling):
    config, count, (ones, factors, between) = PUBLISHED[name]
    resolved, planned = _plan(spelling(config))
    factor = config["rope_scaling"]["factor"]
    assert len(planned) == count
    assert "output.weight" not in {tensor.name for tensor in planned}
    assert resolved.spec.decoder.context_length == 131072
    assert resolved.llama.eos == 128001
    (rope,) = (tensor for tensor in planned if tensor.name == "rope_freqs.weight")
    (found,) = rope.produce()
    assert found.dtype == np.float32
    assert found.shape == (config["head_dim"] // 2,)
    np.testing.assert_array_equal(found, [*[1] * ones, *found[ones:-factors], *[factor] * factors])
    np.testing.assert_allclose(
        found[ones:-factors], between, rtol=0, atol=1e-6
    )  # the table: six decimals, from float32


#: Keys that published config.json files of other relatives have beside those above.
OTHERS = {
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2, "rope_scaling": None,
                "transformers.js_config": {"dtype": "q4"}},
    "Vicuna": {"max_sequence_length": 2048, "pad_token_id": 0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "DeepSeek-LLM": {"bos_token_id": 100000, "eos_token_id": 100001, "rope_scaling": None, "vocab_size": 102400},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_keys_of_relatives_are_known(name):
    resolved, _ = _plan(_LLAMA32 | _1B | OTHERS[name])
    assert resolved.llama.rope["rope_type"] == ("linear" if name == "Vicuna" else "default")


_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "context"),
    [({"sliding_window": 4096}, 4096), ({"sliding_window": None}, 32768), ({}, 4096),
     ({"sliding_window": 1 << 20}, 32768)],
)  # fmt: skip
def test_a_sliding_window_limits_the_context(said, context):
    assert _plan(_MISTRAL | said)[0].spec.decoder.context_length == context


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 0}, {"sliding_window": True}, {"sliding_window": "4096"}, {"model_type": "llama"},
     {"attention_bias": True}, {"layer_types": ["sliding_attention"] * 2}],
    ids=str,
)  # fmt: skip
def test_what_is_not_mistral_7b_is_refused(change):
    with pytest.raises(CheckpointError):
        _plan(_MISTRAL | {"sliding_window": None} | change)


@pytest.mark.parametrize("change", [{"rope_interleaved": True}, {"sliding_window": 4096}, {"model_type": "mistral"}])
def test_what_is_not_llama_is_refused(change):
    with pytest.raises(CheckpointError):
        _plan(_LLAMA32 | _1B | change)
