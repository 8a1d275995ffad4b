"""mmproj files that lie or are damaged, and text models beside them: one of our errors, and nothing is left behind."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import tiny_mmproj
import tiny_smolvlm
import toy_gguf
from test_convert_llava_original import original
from test_mmproj import SMOLVLM, bundle, paired
from tiny_mmproj import KINDS, TYPES
from toy_gguf import ARR, F32, STR, U32

from edgevlm.converters import convert, mmproj
from edgevlm.errors import CheckpointError, EdgeVLMError, FileError, GGUFError
from edgevlm.gguf import read_header

#: Keys that say nothing about the numbers.
IGNORED = {"general.name", "general.file_type", "general.quantization_version", "general.description",
           "clip.vision.projection_dim"}  # fmt: skip
WIDTH = 64


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """(checkpoint, text model)."""
    folder, _, text = bundle(tiny_smolvlm.shared(SMOLVLM)[0], tmp_path_factory.mktemp("smolvlm"))
    return folder, text


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(checkpoint, tower)."""
    return original(tmp_path_factory.mktemp("llava"))


@pytest.fixture(params=["smolvlm", "llava"])
def file(request, smolvlm, llava):
    """A sound file of each family."""
    return tiny_mmproj.modern(smolvlm[0]) if request.param == "smolvlm" else tiny_mmproj.legacy(*llava)


def read(file, path):
    return mmproj.read_mmproj(file.save(path / "mmproj.gguf"), n_embd=WIDTH)


def refused(file, path, code="", words="."):
    with pytest.raises(EdgeVLMError, match=words) as caught:
        read(file, path)
    assert caught.value.code.startswith(code or ("checkpoint.", "gguf."))
    assert "\n" not in str(caught.value)
    return caught.value


def toy(file, **changes):
    """The same header byte by byte, over data of zeros; `changes` are those of `toy_gguf.build`."""
    metadata = {"general.architecture": (STR, "clip")}
    metadata |= {key: (ARR, int(kind), value) if isinstance(value, list) else (int(kind), value)
                 for key, (value, kind) in file.keys.items()}  # fmt: skip
    tensors, offset = [], 0
    for name, values in file.tensors.items():
        nbytes = values.size * 4
        tensors.append((name, values.shape[::-1], 0, offset, -(-nbytes // 32) * 32))
        offset += tensors[-1][-1]
    return toy_gguf.build(**{"metadata": metadata, "tensors": tensors} | changes), metadata, tensors


def test_sound_files_are_read(file, tmp_path):
    found = read(file, tmp_path)
    assert len(found.tower) + len(found.connector) == len(file.tensors)
    path = tmp_path / "toy.gguf"
    path.write_bytes(toy(file)[0])
    assert mmproj.read_mmproj(path, n_embd=WIDTH).vision == found.vision


# the container


def test_every_truncation_is_refused(file, tmp_path):
    path = file.save(tmp_path / "mmproj.gguf")
    whole = path.read_bytes()
    found = mmproj.read_container(path)
    ends = [found.data_offset + tensor.offset + tensor.nbytes for tensor in found.tensors]
    places = [place for pair in [*found.places.values(), found.infos] for place in pair]
    lengths = {*range(0, found.data_offset, 37), *(end - back for end in [*ends, *places] for back in (0, 1, 7))}
    for length in lengths - {len(whole), ends[-1]}:
        os.truncate(path, 0)
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            mmproj.read_mmproj(path, n_embd=WIDTH)


CONTAINERS = {
    "overlap": (lambda t: {"tensors": [t[0], (*t[1][:3], 0, t[1][4]), *t[2:]]}, "gguf.invalid"),
    "a gap": (lambda t: {"tensors": [t[0], (*t[1][:3], t[1][3] + 32, t[1][4]), *t[2:]]}, "gguf.invalid"),
    "beyond the end": (lambda t: {"tensors": [*t[:-1], (*t[-1][:4], 0)]}, "gguf.truncated"),
    "a name twice": (lambda t: {"tensors": [t[0], (t[0][0], *t[1][1:]), *t[2:]]}, "gguf.invalid"),
    "2^62 columns": (lambda t: {"tensors": [(t[0][0], (1 << 62, 3), *t[0][2:]), *t[1:]]}, "gguf.invalid"),
    "no columns": (lambda t: {"tensors": [(t[0][0], (0, 3), *t[0][2:]), *t[1:]]}, "gguf.invalid"),
    "five axes": (lambda t: {"tensors": [(t[0][0], (1, 1, 1, 1, 1), *t[0][2:]), *t[1:]]}, "gguf."),
    "type 99": (lambda t: {"tensors": [(*t[0][:2], 99, *t[0][3:]), *t[1:]]}, "gguf.unsupported"),
    "whole numbers": (lambda t: {"tensors": [(*t[0][:2], 26, *t[0][3:]), *t[1:]]}, "gguf.unsupported"),
    "2^63 tensors": (lambda t: {"n_tensors": 1 << 63}, "gguf.invalid"),
    "2^63 keys": (lambda t: {"n_kv": 1 << 63}, "gguf.invalid"),
    "a tensor too many": (lambda t: {"n_tensors": len(t) + 1}, "gguf."),
    "another magic": (lambda t: {"magic": b"GGML"}, "gguf.invalid"),
    "version 1": (lambda t: {"version": 1}, "gguf.unsupported"),
    "bytes behind": (lambda t: {"extra": b"x" * 40}, "gguf.invalid"),
    "no tensors": (lambda t: {"tensors": []}, "checkpoint."),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_broken_containers_are_refused(file, tmp_path, case):
    change, code = CONTAINERS[case]
    _, _, tensors = toy(file)
    (tmp_path / "mmproj.gguf").write_bytes(toy(file, **change(tensors))[0])
    with pytest.raises(EdgeVLMError) as caught:
        mmproj.read_mmproj(tmp_path / "mmproj.gguf", n_embd=WIDTH)
    assert caught.value.code.startswith(code)


def test_random_damage_never_escapes(file, tmp_path):
    """Whatever is flipped in the header: it is read, or one of our errors; never another exception."""
    rng = random.Random(5)
    path = file.save(tmp_path / "mmproj.gguf")
    header = mmproj.read_container(path)
    whole, refusals = path.read_bytes(), 0
    for i in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header.data_offset)] = rng.randrange(256)
        (tmp_path / f"{i}.gguf").write_bytes(damaged)  # files that are mapped must not change
        try:
            mmproj.read_mmproj(tmp_path / f"{i}.gguf", n_embd=WIDTH)
        except EdgeVLMError:
            refusals += 1
        (tmp_path / f"{i}.gguf").unlink()
    assert refusals > 400


def test_odd_paths(smolvlm, tmp_path):
    _, text = smolvlm
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, code in ((tmp_path / "absent.gguf", "file.not_found"), (tmp_path, "file.not_regular"),
                       (tmp_path / "pipe.gguf", "file.not_regular")):  # fmt: skip
        for given in ((text, path), (path, text)):
            if given[0] != tmp_path:  # a folder is another kind of source
                with pytest.raises(FileError) as caught:
                    convert(given[0], tmp_path / "out", mmproj=given[1])
                assert caught.value.code == code


# keys


def test_every_key_of_another_type_is_refused(file, tmp_path):
    _, metadata, _ = toy(file)
    for key, (kind, *rest) in metadata.items():
        for wrong in ((F32, 1.0), (STR, "1"), (U32, 1), (ARR, U32, [1]), (ARR, STR, ["1"])):
            if key in IGNORED or wrong[0] == kind or (key, wrong) == ("clip.has_llava_projector", (U32, 1)):
                continue
            if wrong[0] == ARR and kind == ARR and wrong[1] == rest[0]:
                continue
            (tmp_path / "mmproj.gguf").unlink(missing_ok=True)
            (tmp_path / "mmproj.gguf").write_bytes(toy(file, metadata=metadata | {key: wrong})[0])
            with pytest.raises(EdgeVLMError) as caught:
                mmproj.read_mmproj(tmp_path / "mmproj.gguf", n_embd=WIDTH)
            assert caught.value.code.startswith(("checkpoint.", "gguf.")), (key, wrong)


#: Numbers that are not the file's own but may be.
POSSIBLE = {("clip.vision.attention.head_count", 1), ("clip.vision.feed_forward_length", 0),
            ("clip.vision.preproc_image_size", 1)}  # fmt: skip


def test_every_absurd_number_is_refused(file, tmp_path):
    for key, (value, kind) in file.keys.items():
        if kind != KINDS.UINT32 or key in IGNORED:
            continue
        for wrong in {0, 1, 5, 1 << 31, (1 << 32) - 1} - {value}:
            if (key, wrong) not in POSSIBLE and (key, wrong) != ("clip.vision.preproc_image_size", 5):
                file.keys[key] = (wrong, kind)
                refused(file, tmp_path, "checkpoint.")
        file.keys[key] = (value, kind)
    read(file, tmp_path)


def test_every_key_is_needed(file, tmp_path):
    optional = {"general.type", "clip.has_vision_encoder", "clip.has_text_encoder", "clip.has_llava_projector",
                "clip.vision.preproc_image_size", "clip.vision.feed_forward_length", *IGNORED}  # fmt: skip
    if "clip.has_llava_projector" in file.keys:
        optional |= {"clip.use_gelu"}
    for key in list(file.keys):
        kept = file.keys.pop(key)
        if key in optional:
            read(file, tmp_path)
        else:
            refused(file, tmp_path, "checkpoint.")
        file.keys[key] = kept


TRIPLES = [[], [0.5], [0.5, 0.5], [0.5] * 4, [0.5, 0.5, float("nan")], [0.5, 0.5, float("inf")], [0.5, 0.5, -1.0]]


def test_means_and_deviations(file, tmp_path):
    for key in ("clip.vision.image_mean", "clip.vision.image_std"):
        kept = file.keys[key]
        for values in [*TRIPLES, *([[0.5, 0.0, 0.5]] if "std" in key else [])]:
            file.keys[key] = (values, KINDS.FLOAT32)
            if values:  # the package `gguf` writes no empty array
                refused(file, tmp_path, "checkpoint.invalid", key)
        file.keys[key] = kept


FALSE = {
    "clip.has_vision_encoder": (False, KINDS.BOOL), "clip.has_audio_encoder": (True, KINDS.BOOL),
    "clip.has_text_encoder": (True, KINDS.BOOL), "clip.has_minicpmv_projector": (True, KINDS.BOOL),
    "clip.use_silu": (True, KINDS.BOOL), "clip.vision.image_grid_pinpoints": ([336, 672], KINDS.INT32),
    "clip.vision.mm_patch_merge_type": ("spatial_unpad", KINDS.STRING),
    "clip.vision.spatial_merge_size": (2, KINDS.UINT32),
    "clip.vision.image_aspect_ratio": ("anyres", KINDS.STRING), "clip.vision.window_size": (8, KINDS.UINT32),
    "clip.vision.attention.head_count_kv": (1, KINDS.UINT32), "clip.vision.attention.head_dim": (7, KINDS.UINT32),
    "clip.vision.attention.layer_norm_epsilon": (float("nan"), KINDS.FLOAT32),
    "clip.vision.projector_type": ("pixtral", KINDS.STRING), "general.architecture": ("llama", KINDS.STRING),
    "general.type": ("model", KINDS.STRING), "clip.audio.block_count": (2, KINDS.UINT32),
    "tokenizer.ggml.model": ("gpt2", KINDS.STRING), "clip.vision.feature_layer": ([1, 2], KINDS.INT32),
    "clip.minicpmv_version": (2, KINDS.INT32),
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in FALSE if key != "general.architecture"])
def test_what_cannot_be_run_is_refused(file, tmp_path, key):
    file.keys[key] = FALSE[key]
    refused(file, tmp_path, "checkpoint.")


@pytest.mark.parametrize("layer", [[-1], [4], [], [1 << 30]], ids=str)
def test_states_that_a_tower_does_not_have(llava, tmp_path, layer):
    file = tiny_mmproj.legacy(*llava)
    _, metadata, _ = toy(file)
    wrong = toy(file, metadata=metadata | {"clip.vision.feature_layer": (ARR, toy_gguf.I32, layer)})[0]
    (tmp_path / "mmproj.gguf").write_bytes(wrong)
    with pytest.raises(CheckpointError, match="feature_layer"):
        mmproj.read_mmproj(tmp_path / "mmproj.gguf", n_embd=WIDTH)


@pytest.mark.parametrize("projector", ["resampler", "ldp", "qwen2vl_merger", "janus_pro", "gemma3", "x" * 1000])
def test_other_projectors_are_refused_with_a_list(file, tmp_path, projector):
    file.keys["clip.projector_type"] = (projector, KINDS.STRING)
    error = refused(file, tmp_path, "checkpoint.unsupported", "supported are idefics3, mlp")
    assert len(str(error)) < 200


# tensors


def test_every_tensor_is_needed(file, tmp_path):
    for name in list(file.tensors):
        kept = file.tensors.pop(name)
        refused(file, tmp_path, "checkpoint.")
        file.tensors = {**file.tensors, name: kept}
    read(file, tmp_path)


def test_every_shape_counts(file, tmp_path):
    for name, values in file.tensors.items():
        for wrong in (values[:-1], np.concatenate([values, values[:1]]), values.T if values.ndim == 2 else values[:-2]):
            if wrong.shape != values.shape:
                file.tensors[name] = np.ascontiguousarray(wrong)
                refused(file, tmp_path, "checkpoint.")
        file.tensors[name] = values
    read(file, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["v.blk.9.ln1.weight", "mm.3.weight", "v.image_newline", "model.image_newline", "v.blk.0.ls1.weight", "mm.1.bias",
     "v.blk.0.attn_q_norm.weight", "v.blk.0.ffn_gate.weight", "resampler.query", "v.blk.00.ln1.weight", "a.b"],
)  # fmt: skip
def test_tensors_without_a_place_are_refused(file, tmp_path, name):
    file.tensors[name] = np.zeros(48, np.float32)
    refused(file, tmp_path, "checkpoint.")


def test_joined_attention_must_be_whole_and_alone(file, tmp_path):
    file.tensors["v.blk.0.attn_qkv.weight"] = np.zeros((144, 48), np.float32)
    refused(file, tmp_path, "checkpoint.invalid", "twice")
    for part in "qkv":
        del file.tensors[f"v.blk.0.attn_{part}.weight"]
    file.tensors["v.blk.0.attn_qkv.weight"] = np.zeros((143, 48), np.float32)
    refused(file, tmp_path, "checkpoint.missing_tensor")


def test_fc1_and_fc2_that_look_alike(file, tmp_path):
    for name in [name for name in file.tensors if ".ffn_" in name]:
        square = (48, 48) if name.endswith("weight") else (48,)
        file.tensors[name] = np.zeros(square, np.float32)
    refused(file, tmp_path, "checkpoint.unsupported", "look alike")


def test_the_width_of_another_text_model(file, tmp_path):
    path = file.save(tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointError, match="of width 64, the text model takes 128: they are no pair"):
        mmproj.read_mmproj(path, n_embd=128)


# numbers


@pytest.mark.parametrize(
    ("name", "kind"),
    [("v.blk.1.ln2.bias", TYPES.F32), ("v.blk.0.attn_out.weight", TYPES.F16), ("v.position_embd.weight", TYPES.F32),
     ("mm.model.fc.weight", TYPES.BF16), ("mm.model.fc.weight", TYPES.Q8_0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(smolvlm, tmp_path, name, kind, number):
    folder, text = smolvlm
    file = tiny_mmproj.modern(folder)
    file.types[name] = kind
    file.tensors[name].reshape(-1)[7] = number
    with np.errstate(all="ignore"), pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity") as caught:
        paired(text, file, tmp_path)
    assert caught.value.code == "checkpoint.invalid"
    assert sorted(os.listdir(tmp_path)) == ["mmproj.gguf"]


# the text model


def damaged_norm(raw, header):
    tensor = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    start = header.data_offset + tensor.offset
    return raw[:start] + np.float32(np.nan).tobytes() + raw[start + 4 :]


def damaged_scale(raw, header):
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.0.ffn_up.weight")
    start = header.data_offset + tensor.offset  # the scale of a block of Q8_0
    return raw[:start] + np.float16(np.inf).tobytes() + raw[start + 2 :]


TEXTS = {
    "NaN": (damaged_norm, "output_norm.weight of the text model holds NaN or infinity"),
    "an infinite scale": (damaged_scale, "blk.0.ffn_up.weight of the text model holds NaN or infinity"),
    "half a file": (lambda raw, header: raw[: len(raw) // 2], "copy it again"),
    "no data": (lambda raw, header: raw[: header.data_offset], "copy it again"),
    "a tensor of another name": (lambda raw, _: raw.replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"), "attn_k"),
    "no merges": (lambda raw, _: raw.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"), "tokenizer"),
    "a layer too many": (
        lambda raw, _: raw.replace(b"llama.block_count\4\0\0\0\2", b"llama.block_count\4\0\0\0\3"),
        "blk.2",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_damaged_text_model_is_refused(smolvlm, tmp_path, case, capfd):
    change, words = TEXTS[case]
    folder, text = smolvlm
    raw = text.read_bytes()
    damaged = change(raw, read_header(text))
    assert damaged != raw
    (tmp_path / "text.gguf").write_bytes(damaged)
    with pytest.raises(EdgeVLMError, match=words) as caught:
        paired(tmp_path / "text.gguf", tiny_mmproj.modern(folder), tmp_path)
    assert caught.value.code.startswith(("gguf.", "checkpoint."))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # nor does llama.cpp say anything
    assert sorted(os.listdir(tmp_path)) == ["mmproj.gguf", "text.gguf"]
