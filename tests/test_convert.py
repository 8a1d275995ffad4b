"""The whole conversion against transformers: same tokens, same embeddings, same logits; and twice the same bytes."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import Variant

from edgevlm.bundle import MANIFEST_NAME, open_bundle
from edgevlm.converters import DECODER_QUANTS, convert
from edgevlm.converters.verify import cosines, relative_error
from edgevlm.decoder import Decoder
from edgevlm.encoder import Encoder
from edgevlm.errors import StorageError, UsageError
from edgevlm.gguf import read_header
from edgevlm.llama import library
from edgevlm.splice import ImageSegment, TextSegment

VARIANTS = {
    "siglip": Variant(),
    "clip": Variant(tower="clip", feature_layer=-2, strategy="default"),
    "clip-full": Variant(tower="clip", feature_layer=-1, strategy="full", rope="llama3"),
    "siglip-default": Variant(strategy="default", feature_layer=2, activation="gelu", rope="linear"),
    "siglip-first-state": Variant(feature_layer=-4, bias=False),
    "tied-bfloat16": Variant(tied=True, dtype=torch.bfloat16, feature_layer=1),
    "float16": Variant(dtype=torch.float16, feature_layer=-3),
    "spm": Variant(tower="clip", tokenizer="spm"),
    "wide-heads": Variant(head_dim=32, heads_kv=1),
}
# Largest difference of float32 embeddings (size ~20) and logits (size ~4). Both sides sum in float32 in different
# orders over a few hundred terms: 1e-5 was seen; the limits of the contract are 10 and 100 times that.
EMBED_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """(bundle, model) of each variant, with nothing lost to quantization."""
    folder, model = tiny.shared(VARIANTS[request.param])
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    return open_bundle(out), model


def pixels(tiles=2):
    """Random tiles; the last has little contrast, so that the epsilon of the first norm matters."""
    tiles_TCHW = np.random.default_rng(0).normal(size=(tiles, 3, tiny.SIDE_PX, tiny.SIDE_PX)).astype(np.float32)
    tiles_TCHW[-1] *= 0.02
    return tiles_TCHW


def reference_embeds(model, tiles_TCHW):
    with torch.no_grad():
        config = model.config
        output = model.model.get_image_features(
            torch.from_numpy(tiles_TCHW),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    return torch.stack(list(output.pooler_output)).numpy()


def test_the_encoder_gives_the_embeddings_of_transformers(converted):
    bundle, model = converted
    tiles_TCHW = pixels()
    found = Encoder(bundle.path("encoder"), bundle.spec.encoder).encode(tiles_TCHW)
    wanted = reference_embeds(model, tiles_TCHW)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= EMBED_TOLERANCE
    assert cosines(wanted, found).min() >= 0.99999


def test_the_embedding_comparison_can_fail(converted):
    """The twin of the test above: damage of the size of a real mistake is seen."""
    bundle, model = converted
    tiles_TCHW = pixels()
    found = Encoder(bundle.path("encoder"), bundle.spec.encoder).encode(tiles_TCHW)
    tower = model.model.vision_tower
    # one channel: a norm takes an equal shift of all of them away
    changes = {"positions": (tower.embeddings.position_embedding.weight.data[:, 0], 1e-3)}
    if bundle.spec.encoder.layers:
        changes["a bias"] = (tower.encoder.layers[0].self_attn.v_proj.bias.data, 1e-3)
    for name, (parameter, amount) in changes.items():
        parameter += amount
        wanted = reference_embeds(model, tiles_TCHW)
        parameter -= amount
        assert np.abs(found - wanted).max() > EMBED_TOLERANCE, name
    if bundle.spec.encoder.layers:
        norms = [module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)]
        for norm in norms:  # CLIP's 1e-5 for SigLIP's 1e-6, or the reverse
            norm.eps = 1e-5 if norm.eps == 1e-6 else 1e-6
        wanted = reference_embeds(model, tiles_TCHW)
        for norm in norms:
            norm.eps = bundle.spec.encoder.layer_norm_eps
        assert np.abs(found - wanted).max() > EMBED_TOLERANCE, "epsilon"


def exact_logits(path, segments):
    """Logits of the last position, float32 [n_vocab], with llama.cpp's plain attention.

    The runtime's flash attention rounds to float16 inside, which costs 1e-2 on these logits; it would hide mistakes.
    """
    llama = library()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    context = llama.llama_init_from_model(model, params)
    position = 0
    for segment in segments:
        rows = isinstance(segment, ImageSegment)
        width = segment.rows_ND.shape[1] if rows else 0
        batch = llama.llama_batch_init(len(segment), width, 1)
        for i in range(len(segment)):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i, 1, 0
            batch.logits[i] = i == len(segment) - 1
            if not rows:
                batch.token[i] = segment.tokens[i]
        if rows:
            ctypes.memmove(batch.embd, np.ascontiguousarray(segment.rows_ND).ctypes.data, segment.rows_ND.nbytes)
        batch.n_tokens = len(segment)
        assert llama.llama_decode(context, batch) == 0
        llama.llama_batch_free(batch)
        position += len(segment)
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits


def test_text_and_picture_give_the_logits_of_transformers(converted):
    bundle, model = converted
    rng = np.random.default_rng(2)
    before, after = (tuple(map(int, rng.integers(0, 400, count))) for count in (7, 11))
    tiles_TCHW = pixels(tiles=1)
    rows_ND = Encoder(bundle.path("encoder"), bundle.spec.encoder).encode(tiles_TCHW)[0]
    ids = torch.tensor([[*before, *[model.config.image_token_index] * len(rows_ND), *after]])
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=torch.from_numpy(tiles_TCHW)).logits[0, -1].numpy()
    found = exact_logits(bundle.path("decoder"), [TextSegment(before), ImageSegment(rows_ND), TextSegment(after)])
    assert np.abs(found - wanted).max() <= LOGIT_TOLERANCE
    # The twin: the same picture with its rows in reverse is seen.
    other = [TextSegment(before), ImageSegment(rows_ND[::-1].copy()), TextSegment(after)]
    assert np.abs(exact_logits(bundle.path("decoder"), other) - wanted).max() > LOGIT_TOLERANCE


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_long_texts_give_the_logits_of_transformers(tmp_path, rope):
    """200 positions: a wrong rotary scaling shows only far from the start."""
    folder, model = tiny.shared(Variant(rope=rope))
    convert(folder, tmp_path / "out", decoder_quant="f32")
    ids = tuple(map(int, np.random.default_rng(1).integers(0, 400, 200)))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    path = tmp_path / "out" / "decoder.gguf"
    assert np.abs(exact_logits(path, [TextSegment(ids)]) - wanted).max() <= LOGIT_TOLERANCE
    # The twin: two tokens of the middle exchanged, which only their positions can tell.
    swapped = (*ids[:100], ids[101], ids[100], *ids[102:])
    assert np.abs(exact_logits(path, [TextSegment(swapped)]) - wanted).max() > LOGIT_TOLERANCE


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_int8_stays_close_and_the_bundle_says_how_close(tmp_path, tower):
    folder, model = tiny.shared(VARIANTS[tower])
    manifest = convert(folder, tmp_path / "out", encoder_quant="int8")
    tiles_TCHW = pixels()
    found = Encoder(tmp_path / "out" / "encoder.onnx", manifest.spec.encoder).encode(tiles_TCHW)
    wanted = reference_embeds(model, tiles_TCHW)
    # Random weights have no redundancy: 0.998 was seen on both towers. A trained tower loses less.
    assert cosines(wanted, found).min() >= 0.995
    recorded = manifest.fidelity["encoder"]
    assert 0.995 <= recorded["cosine_min"] <= recorded["cosine_mean"] < 1
    assert 0 < recorded["relative_error"] < 0.05
    assert relative_error(wanted, found) < 0.05 < relative_error(wanted, np.roll(found, 1, axis=1))


# a width of 256 fits every block; 64 does not fit the blocks of 256 of the K types
EXPECTED_TYPES = {
    "f32": {"F32"}, "f16": {"F32", "F16"}, "bf16": {"F32", "BF16"}, "q8_0": {"F32", "Q8_0"}, "q6_k": {"F32", "Q6_K"},
    "q5_k_m": {"F32", "Q5_K", "Q6_K"}, "q4_k_m": {"F32", "Q4_K", "Q6_K"}, "iq4_nl": {"F32", "IQ4_NL", "Q6_K"},
    "q4_0": {"F32", "Q4_0"},
}  # fmt: skip
LARGEST_ERROR = {
    "f32": 0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 0.007, "q6_k": 0.03, "q5_k_m": 0.05, "q4_k_m": 0.09, "iq4_nl": 0.09,
    "q4_0": 0.11,
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODER_QUANTS)
def test_every_decoder_type(tmp_path, kind):
    folder, model = tiny.shared(Variant(hidden=256, n_ff=512))
    manifest = convert(folder, tmp_path / "out", decoder_quant=kind.upper(), encoder_quant="fp32")
    cost = manifest.fidelity["decoder"]
    assert set(cost["types"]) == EXPECTED_TYPES[kind]
    assert cost["replaced"] == {}
    assert cost["relative_error"] <= LARGEST_ERROR[kind]
    assert kind == "f32" or cost["relative_error"] > 0
    decoder = Decoder(tmp_path / "out" / "decoder.gguf", context=256)
    ids = decoder.vocabulary.tokenize("The gauge reads 73.5 psi.", True, True)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    decoder.prefill([TextSegment(tuple(ids))])
    # Logits of random weights amplify the error of the weights; a broken type gives noise without correlation.
    assert np.corrcoef(decoder.logits(), wanted)[0, 1] > 0.95
    decoder.close()


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_types_that_llama_cpp_replaces_are_named(tmp_path, kind):
    manifest = convert(tiny.shared(Variant())[0], tmp_path / "out", decoder_quant=kind)
    replaced = manifest.fidelity["decoder"]["replaced"]
    assert "rows of 64 do not fit" in replaced["blk.0.attn_q.weight"]
    assert len(replaced) == 16


def test_converting_twice_gives_the_same_bytes(tmp_path):
    folder = tiny.copy(VARIANTS["clip"], tmp_path / "model")
    elsewhere = Path(shutil.copytree(folder, tmp_path / "other" / "model"))
    for source, out in ((folder, "a"), (elsewhere, "b")):
        convert(source, tmp_path / out, decoder_quant="q4_k_m", encoder_quant="int8")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["bundle.json", "decoder.gguf", "encoder.onnx", "encoder.onnx.data"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_bundle_tells_where_it_comes_from(tmp_path):
    folder, _ = tiny.shared(VARIANTS["siglip"])
    manifest = convert(folder, tmp_path / "out", name="Tiny", source="example/tiny")
    assert manifest == open_bundle(tmp_path / "out").manifest
    assert manifest.spec.name == "Tiny"
    assert manifest.provenance["source"] == "example/tiny"
    assert manifest.provenance["model_card"] == {"license": "apache-2.0", "base_model": "tiny/random"}
    assert set(manifest.provenance["source_files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert manifest.provenance["arguments"] == {"decoder_quant": "q4_k_m", "encoder_quant": "int8"}
    assert str(folder.parent) not in (tmp_path / "out" / MANIFEST_NAME).read_text()
    metadata = read_header(tmp_path / "out" / "decoder.gguf").metadata
    assert (metadata["general.name"], metadata["general.license"]) == ("Tiny", "apache-2.0")
    assert metadata["tokenizer.chat_template"] == tiny.TEMPLATE


def test_a_list_of_base_models_is_recorded(tmp_path):
    folder = tiny.copy(VARIANTS["siglip"], tmp_path / "model")
    (folder / "README.md").write_text("---\nbase_model:\n- a/b\n  - 'c/d'\nlicense: mit\n---\n")
    manifest = convert(folder, tmp_path / "out")
    assert manifest.provenance["model_card"] == {"license": "mit", "base_model": "a/b, c/d"}


def test_the_folder_names_the_model_even_when_it_is_written_oddly(tmp_path):
    folder = tiny.copy(VARIANTS["siglip"], tmp_path / "model")
    (folder / "sub").mkdir()
    assert convert(folder / "sub" / "..", tmp_path / "out").spec.name == "model"


def test_unknown_types_are_usage_errors(tmp_path):
    folder, _ = tiny.shared(VARIANTS["siglip"])
    with pytest.raises(UsageError, match="q4_k_m"):
        convert(folder, tmp_path / "out", decoder_quant="q3")
    with pytest.raises(UsageError, match="int8, fp32, fp16, int4"):
        convert(folder, tmp_path / "out", encoder_quant="int2")


def test_only_a_bundle_is_overwritten_and_only_on_request(tmp_path):
    folder, _ = tiny.shared(VARIANTS["siglip"])
    out = tmp_path / "out"
    convert(folder, out, decoder_quant="q8_0")
    with pytest.raises(StorageError, match="exists already"):
        convert(folder, out)
    convert(folder, out, decoder_quant="f16", overwrite=True)
    assert open_bundle(out).manifest.provenance["arguments"]["decoder_quant"] == "f16"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(StorageError, match="not a bundle"):
        convert(folder, precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
