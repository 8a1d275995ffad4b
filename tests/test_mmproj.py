"""Pairs of llama.cpp's files: the same bundles as from the checkpoints that they were made of.

The numbers of a file in F16, BF16 or a quantized type are written back into a copy of the checkpoint, so that nothing
is left to a tolerance: both sources must give the same bytes. What those bytes compute is compared with transformers
in `test_smolvlm.py` and `test_convert_llava_original.py`.
"""

from __future__ import annotations

import dataclasses
import re

import mtmd
import numpy as np
import pytest
import tiny
import tiny_mmproj
import tiny_smolvlm
from pictures import picture
from test_convert_llava_original import MM, original
from test_smolvlm import layout_ids, reference_inputs
from tiny import Variant
from tiny import copy as tiny_copy
from tiny_mmproj import KINDS, TYPES

import edgevlm
from edgevlm import families
from edgevlm.bundle import open_bundle
from edgevlm.converters import convert, gguf_file
from edgevlm.errors import CheckpointError
from edgevlm.families.mmproj import LLAVA_MLP
from edgevlm.gguf import _TENSOR_TYPES

SMOLVLM = tiny_smolvlm.Variant()
WIDE = tiny_smolvlm.Variant(hidden=96)  # rows of 96 are whole blocks, those of 80 are not
IDEFICS3 = tiny_smolvlm.Variant(kind="idefics3", rows=False, side_px=90, factor=3, longest_px=170)
STORED = [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q5_1]


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """(checkpoint, its bundle, the text model alone): what pairs are compared with."""
    return bundle(tiny_smolvlm.shared(SMOLVLM)[0], tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(checkpoint, bundle, text model, tower)."""
    root = tmp_path_factory.mktemp("llava")
    folder, tower = original(root)
    return *bundle(folder, root, tower), tower


def bundle(folder, root, tower=None):
    out = root / "bundle"
    convert(folder, out, decoder_quant="q8_0", encoder_quant="fp32", tower=tower, fidelity_tokens=0)
    return folder, out, out / "decoder.gguf"


def paired(text, file, root, **options):
    """The manifest of a converted pair."""
    path = file.save(root / "mmproj.gguf")
    return convert(text, root / "out", mmproj=path, **{"encoder_quant": "fp32", "overwrite": True, **options})


def told_apart(one, other):
    """Names of the files that differ."""
    return {a.name for a, b in zip(one.files, other.files, strict=True) if a.sha256 != b.sha256}


# the same bundle


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.name)
def test_smolvlm_gives_the_bundle_of_its_checkpoint(tmp_path, kind):
    folder = tiny_smolvlm.copy(WIDE, tmp_path / "model")
    file = tiny_mmproj.modern(folder, kind=kind)
    assert file.types["v.blk.0.attn_q.weight"] == file.types["mm.model.fc.weight"] == kind
    tiny_mmproj.rounded(folder, file)
    _, out, text = bundle(folder, tmp_path)
    wanted = open_bundle(out).manifest
    found = paired(text, file, tmp_path, name=wanted.spec.name)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    assert found.provenance["notes"] == found.provenance["unused_tensors"] == []
    # The twin: one number of one tensor.
    file.tensors["v.blk.1.ffn_up.weight"][3, 5] += 1.0
    assert told_apart(paired(text, file, tmp_path), wanted) == {"encoder.onnx.data"}


def test_idefics3_without_tokens_of_rows(tmp_path):
    folder, out, text = bundle(tiny_smolvlm.shared(IDEFICS3)[0], tmp_path)
    wanted = open_bundle(out).manifest
    found = paired(text, tiny_mmproj.modern(folder, kind=TYPES.F32), tmp_path, name=wanted.spec.name)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.F32], ids=lambda kind: kind.name)
def test_llava_gives_the_bundle_of_its_original(tmp_path, kind):
    """Pictures are padded, as LLaVA's own code does; the layout of Hugging Face crops."""
    folder, tower = original(tmp_path)
    file = tiny_mmproj.legacy(folder, tower, kind=kind)
    tiny_mmproj.rounded(folder, file, tower)
    _, out, text = bundle(folder, tmp_path, tower)
    wanted = open_bundle(out).manifest
    found = paired(text, file, tmp_path, name=wanted.spec.name)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    assert (found.spec.image.policy, found.spec.encoder.layers) == ("pad_square", 2)


def test_a_linear_projector_in_both_spellings(tmp_path):
    folder, tower = original(tmp_path, config=MM, linear=True)
    file = tiny_mmproj.legacy(folder, tower)
    tiny_mmproj.rounded(folder, file, tower)
    _, out, text = bundle(folder, tmp_path, tower)
    wanted = open_bundle(out).manifest
    assert "mm.weight" in file.tensors  # as the old converter names it
    for _ in range(2):
        found = paired(text, file, tmp_path, name=wanted.spec.name)
        assert (found.spec, found.files) == (wanted.spec, wanted.files)
        file.rename(r"^mm\.(?=weight|bias)", "mm.0.")
    assert (found.spec.family, found.spec.image.policy) == ("llava_linear", "shortest_crop")


def test_a_siglip_tower_behind_the_projector_of_llava(tmp_path):
    """The old converter leaves `use_gelu` false although SigLIP has the tanh form."""
    folder = tiny_copy(Variant(feature_layer=-2), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(tiny_smolvlm.TEMPLATE, encoding="utf-8")  # one that places pictures
    file = tiny_mmproj.legacy(folder)
    assert not file.keys["clip.use_gelu"][0]
    tiny_mmproj.rounded(folder, file)
    _, out, text = bundle(folder, tmp_path)
    wanted = open_bundle(out).manifest
    found = paired(text, file, tmp_path, name=wanted.spec.name)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    (note,) = found.provenance["notes"]
    assert "stretched" in note


# what converters change


def fc_exchanged(file):
    """As new converters name them."""
    for one, other in (("ffn_up", "ffn_x"), ("ffn_down", "ffn_up"), ("ffn_x", "ffn_down")):
        file.rename(rf"{one}\.", f"{other}.")


def qkv_joined(file):
    for name in [name for name in file.tensors if ".attn_q." in name]:
        parts = [name.replace("attn_q", f"attn_{part}") for part in "qkv"]
        joined = name.replace("attn_q", "attn_qkv")
        file.types[joined] = file.types.get(name, TYPES.F32)
        file.tensors[joined] = np.concatenate([file.tensors.pop(part) for part in parts])


def feed_forward_unknown(file):
    file.keys["clip.vision.feed_forward_length"] = (0, KINDS.UINT32)


def other_epsilon(file):
    value = file.keys["clip.vision.attention.layer_norm_epsilon"][0]
    file.keys["clip.vision.attention.layer_norm_epsilon"] = (1e-5 if value < 5e-6 else 1e-6, KINDS.FLOAT32)


def everything_said(file):
    """Keys that mean what is so anyway."""
    heads = file.keys["clip.vision.attention.head_count"][0]
    file.keys |= {
        "clip.vision.attention.head_count_kv": (heads, KINDS.UINT32), "clip.use_silu": (False, KINDS.BOOL),
        "clip.vision.attention.head_dim": (16, KINDS.UINT32), "clip.has_audio_encoder": (False, KINDS.BOOL),
        "general.type": ("mmproj", KINDS.STRING), "quantize.imatrix.file": ("x", KINDS.STRING),
    }  # fmt: skip


def moved_projector_type(file):
    file.keys["clip.vision.projector_type"] = file.keys.pop("clip.projector_type")


#: Change -> how many notes it is worth.
CHANGES = {fc_exchanged: 0, qkv_joined: 0, feed_forward_unknown: 0, everything_said: 0, moved_projector_type: 0,
           other_epsilon: 1}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", ["smolvlm", "llava"])
def test_what_converters_change_is_undone(smolvlm, llava, tmp_path, family, change):
    folder, _, text, *tower = {"smolvlm": smolvlm, "llava": llava}[family]
    make = tiny_mmproj.modern if family == "smolvlm" else tiny_mmproj.legacy
    wanted = paired(text, make(folder, *tower), tmp_path)
    file = make(folder, *tower)
    change(file)
    found = paired(text, file, tmp_path)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    assert len(found.provenance["notes"]) == CHANGES[change]


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16], ids=lambda kind: kind.name)
def test_a_joined_bias_of_two_bytes_a_number_is_split(llava, tmp_path, kind):
    """BF16 arrives as bytes, of which a bias has twice as many as numbers."""
    folder, _, text, tower = llava
    file = tiny_mmproj.legacy(folder, tower, kind=TYPES.BF16)
    file.types |= {name: kind for name in file.tensors if re.search(r"attn_[qkv]\.bias", name)}
    wanted = paired(text, file, tmp_path)
    qkv_joined(file)
    assert file.types["v.blk.1.attn_qkv.bias"] == kind
    found = paired(text, file, tmp_path)
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    file.tensors["v.blk.1.attn_qkv.bias"][48] += 1  # the twin: the first number of K
    assert paired(text, file, tmp_path).files != wanted.files


def test_fc1_and_fc2_are_told_by_their_shapes(llava, tmp_path):
    """The twin of the exchange above: bias and weight always go together."""
    folder, _, text, tower = llava
    file = tiny_mmproj.legacy(folder, tower)
    one, other = (f"v.blk.1.{name}.weight" for name in ("ffn_up", "ffn_down"))
    file.tensors[one], file.tensors[other] = file.tensors[other], file.tensors[one]
    with pytest.raises(CheckpointError, match=r"v\.blk\.1\.ffn_.*has the shape"):
        paired(text, file, tmp_path)


def test_blocks_that_llava_does_not_use(llava, tmp_path):
    folder, _, text, tower = llava
    wanted = paired(text, tiny_mmproj.legacy(folder, tower), tmp_path)
    whole = tiny_mmproj.legacy(folder, tower, drop=False)
    found = paired(text, whole, tmp_path)  # its last norm tells that it is the whole tower
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    unused = found.provenance["unused_tensors"]
    assert "v.post_ln.bias" in unused
    assert {name.split(".")[2] for name in unused if ".blk." in name} == {"2"}
    for name in ("v.post_ln.weight", "v.post_ln.bias"):
        del whole.tensors[name]
    assert paired(text, whole, tmp_path).spec.encoder.layers == 3  # nothing tells: all that is stored runs
    declared = dataclasses.replace(LLAVA_MLP, whole_tower={48: 3})
    family = dataclasses.replace(families.find_mmproj("mlp", whole.tensors)[0], mmproj=(declared,))
    found = paired(text, whole, tmp_path, known_families=(family,))  # as 24 blocks tell for a width of 1024
    assert (found.spec, found.files) == (wanted.spec, wanted.files)


@pytest.mark.parametrize("state", [0, 1, 3])
def test_the_layer_that_a_file_selects(llava, tmp_path, state):
    folder, _, text, tower = llava
    file = tiny_mmproj.legacy(folder, tower, drop=False)
    file.keys["clip.vision.feature_layer"] = ([state], KINDS.INT32)
    tiny.rewrite_json(folder / "config.json", lambda config: config | {"mm_vision_select_layer": state})
    wanted = convert(folder, tmp_path / "wanted", tower=tower, encoder_quant="fp32", fidelity_tokens=0)
    found = paired(text, file, tmp_path)
    assert found.spec.encoder == wanted.spec.encoder
    assert found.spec.encoder.layers == state


def test_sizes_that_old_files_leave_out(smolvlm, tmp_path):
    folder, _, text = smolvlm
    file = tiny_mmproj.modern(folder)
    del file.keys["clip.vision.preproc_image_size"]
    found = paired(text, file, tmp_path)
    assert found.spec.image.longest_px == 4 * 56  # as in all released models
    assert "224 pixels" in found.provenance["notes"][0]


@pytest.mark.parametrize(("said", "policy"), [("pad", "pad_square"), ("square", "shortest_crop")])
def test_the_aspect_ratio_counts_where_a_file_says_it(llava, tmp_path, said, policy):
    folder, _, text, tower = llava
    file = tiny_mmproj.legacy(folder, tower)
    file.keys["clip.vision.image_aspect_ratio"] = (said, KINDS.STRING)
    assert paired(text, file, tmp_path).spec.image.policy == policy


def test_every_type_that_a_header_may_have_can_be_read():
    for type_id, (block, nbytes) in _TENSOR_TYPES.items():
        kind = gguf_file.type_name(type_id)
        bits = np.zeros((2, nbytes), np.uint8)
        found = gguf_file.values(gguf_file.StoredTensor("x", (2, block), kind, bits.size, bits))
        assert (found.shape, found.dtype) == ((2, block), np.float32)


# the same answers


def test_pixels_tokens_and_answers_are_those_of_transformers(smolvlm, tmp_path):
    folder, out, text = smolvlm
    _, reference, processor = tiny_smolvlm.shared(SMOLVLM)
    paired(text, tiny_mmproj.modern(folder, kind=TYPES.F32), tmp_path)
    image = picture("landscape")
    inputs = reference_inputs(processor, "What is it?", [image])
    with edgevlm.load(tmp_path / "out", threads=1) as model, edgevlm.load(out, threads=1) as other:
        assert np.array_equal(model.preprocess(image), inputs["pixel_values"][0].numpy())
        index = reference.config.image_token_id
        assert layout_ids(model, "What is it?", [image], index) == inputs["input_ids"][0].tolist()
        asked = [one.ask("What is it?", [image], max_tokens=8, temperature=0).text for one in (model, other)]
        assert asked[0] == asked[1]
        assert asked[0] != model.ask("What is it?", [image[::-1]], max_tokens=8, temperature=0).text


#: Largest difference of embeddings of size 4.6. ggml looks GELU up in a table of float16 (11 bits: 0.0005 of each
#: activation, a few hundred of which add up) and unrolls pictures to float16; 0.0033 was seen.
GGML_TOLERANCE = 0.01


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16], ids=lambda kind: kind.name)
def test_llama_cpp_reads_the_same_file_and_sees_the_same(smolvlm, tmp_path, kind):
    """The tests' files have the real format; and for SmolVLM, llama.cpp's graph is right."""
    folder, _, text = smolvlm
    file = tiny_mmproj.modern(folder, kind=kind)
    paired(text, file, tmp_path)
    image = picture("large")
    wanted = np.concatenate(mtmd.embeddings(text, tmp_path / "mmproj.gguf", image))
    with edgevlm.load(tmp_path / "out", threads=1) as model:
        found = model.embed_image(image)
    assert np.abs(found - wanted).max() <= GGML_TOLERANCE
    # The twin: two exchanged matrices.
    one, other = "v.blk.1.attn_q.weight", "v.blk.1.attn_k.weight"
    file.tensors[one], file.tensors[other] = file.tensors[other], file.tensors[one]
    paired(text, file, tmp_path)
    with edgevlm.load(tmp_path / "out", threads=1) as model:
        assert np.abs(model.embed_image(image) - wanted).max() > 10 * GGML_TOLERANCE


def test_llama_cpp_reads_the_file_of_llava(llava, tmp_path):
    """Its graph is wrong (one block too few, positions off by one), so that only the format is shown."""
    folder, _, text, tower = llava
    file = tiny_mmproj.legacy(folder, tower)
    paired(text, file, tmp_path)
    (wanted,) = mtmd.embeddings(text, tmp_path / "mmproj.gguf", picture("square"))
    with edgevlm.load(tmp_path / "out", threads=1) as model:
        found = model.embed_image(picture("square"))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() > 10 * GGML_TOLERANCE
