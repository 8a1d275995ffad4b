"""GGUF files and the weights in them: written, read back, and compared with independent arithmetic."""

from __future__ import annotations

import ctypes
import mmap
import os

import gguf
import numpy as np
import pytest
import tiny
import torch
from tiny import Variant

from edgevlm import llama
from edgevlm.converters import convert, gguf_file, quant
from edgevlm.converters.transforms import (
    quantize_columns,
    rope_factors_llama3,
    rope_interleave,
    to_bfloat16_bits,
    to_float16,
)
from edgevlm.errors import BackendError, CheckpointError, StorageError, UsageError
from edgevlm.gguf import read_header

RNG = np.random.default_rng(0)


def planned(name, array, kind="F32"):
    return gguf_file.PlannedTensor(name, array.shape, kind, lambda: (array,))


def write(path, metadata, tensors):
    gguf_file.write(path, gguf_file.header("llama", metadata, tensors), tensors)


def test_written_files_read_back(tmp_path):
    path = tmp_path / "x.gguf"
    a, b, c = (
        RNG.normal(size=(3, 5)).astype("f4"),
        RNG.normal(size=7).astype("f4"),
        np.arange(6, dtype="<u2").reshape(2, 3),
    )
    metadata = {
        "a.bool": True, "a.text": "ünïcode", "a.float": 0.5, "a.int": 3_000_000_000, "a.texts": ["x", "", "▁"],
        "a.ints": [1, -2], "a.floats": [0.0, -1e9],
    }  # fmt: skip
    write(path, metadata, [planned("a", a), planned("b", b), planned("c", c, "BF16")])
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    for key, value in metadata.items():
        assert reader.fields[key].contents() == pytest.approx(value), key
    stored = {tensor.name: tensor for tensor in gguf_file.read_tensors(path)}
    assert {name: tensor.shape for name, tensor in stored.items()} == {"a": (3, 5), "b": (7,), "c": (2, 3)}
    assert np.array_equal(stored["a"].bits, a)
    assert np.array_equal(gguf_file.values(stored["a"], 2), a[::2])
    assert np.array_equal(gguf_file.values(stored["c"]), (c.astype(np.uint32) << 16).view(np.float32))


def test_one_tensor_at_a_time(tmp_path):
    """A tensor is asked for when its turn comes, after its predecessor was written."""
    path = tmp_path / "x.gguf"
    sizes = []

    def produce():
        sizes.append(path.stat().st_size)
        yield np.ones((1 << 18,), np.float32)

    tensors = [gguf_file.PlannedTensor(name, (1 << 18,), "F32", produce) for name in "abc"]
    write(path, {}, tensors)
    assert sizes[1] - sizes[0] >= 1 << 19
    assert sizes[2] - sizes[1] >= 1 << 19


def test_a_tensor_of_another_size_than_planned_is_our_bug(tmp_path):
    tensor = gguf_file.PlannedTensor("a", (3, 5), "F32", lambda: (np.zeros((3, 4), np.float32),))
    with pytest.raises(AssertionError, match="a has 48 bytes, 60 were planned"):
        write(tmp_path / "x.gguf", {}, [tensor])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_weights_keep_every_bit_that_the_type_can_hold(tmp_path, dtype, kind):
    """Compared with the checkpoint by torch, whose rounding is not ours; Q and K row by row."""
    folder, model = tiny.shared(Variant(dtype=dtype))
    convert(folder, tmp_path / "out", decoder_quant=kind)
    stored = {tensor.name: tensor for tensor in gguf_file.read_tensors(tmp_path / "out" / "decoder.gguf")}
    layer = model.model.language_model.layers[1]
    for name, weight in {
        "token_embd.weight": model.model.language_model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
        "blk.1.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.1.ffn_down.weight": layer.mlp.down_proj.weight,
    }.items():
        rounded = weight.detach().to(torch.bfloat16).float() if kind == "bf16" else weight.detach()
        assert np.array_equal(gguf_file.values(stored[name]), rounded.numpy()), name
    for name, weight, heads in (("q", layer.self_attn.q_proj.weight, 4), ("k", layer.self_attn.k_proj.weight, 2)):
        found, wanted = gguf_file.values(stored[f"blk.1.attn_{name}.weight"]), weight.detach().numpy()
        half = len(wanted) // heads // 2
        for head in range(heads):
            for i in range(half):  # channel i of a head pairs with i + half in one order, 2i with 2i + 1 in the other
                row = head * 2 * half
                tolerance = 0 if kind == "f32" else 2**-8
                assert np.allclose(found[row + 2 * i], wanted[row + i], rtol=tolerance, atol=0)
                assert np.allclose(found[row + 2 * i + 1], wanted[row + i + half], rtol=tolerance, atol=0)
    assert stored["blk.1.attn_norm.weight"].type == "F32"
    assert stored["output_norm.weight"].type == "F32"


def test_a_tied_model_has_no_output_matrix(tmp_path):
    convert(tiny.shared(Variant(tied=True))[0], tmp_path / "out")
    names = {tensor.name for tensor in gguf_file.read_tensors(tmp_path / "out" / "decoder.gguf")}
    assert "output.weight" not in names
    assert "rope_freqs.weight" not in names


def test_the_runtime_accepts_every_file(tmp_path):
    convert(tiny.shared(Variant(rope="linear"))[0], tmp_path / "out")
    metadata = read_header(tmp_path / "out" / "decoder.gguf").metadata
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 2.0
    assert metadata["general.quantization_version"] == 2


# arithmetic

# head_dim, factor -> ones, index of the first value between, values between, count of `factor` at the end
# recomputed by hand from the published formula for Llama 3.2 1B, 3B, Llama Guard 3 1B and Llama 3.1 (theta 500000)
GOLDEN = [
    (64, 32, 15, [1.651329, 3.292262, 9.666729], 14),
    (128, 32, 29, [1.234937, 1.651329, 2.276660, 3.292262, 5.171596, 9.666729], 29),
    (64, 8, 15, [1.553415, 2.694530, 5.257327], 14),
    (128, 8, 29, [1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327], 29),
]


@pytest.mark.parametrize(("head_dim", "factor", "ones", "between", "ends"), GOLDEN)
def test_llama3_rope_factors(head_dim, factor, ones, between, ends):
    found = rope_factors_llama3(
        head_dim=head_dim, base=500000.0, factor=factor, low=1.0, high=4.0, original_context=8192
    )
    assert found.dtype == np.float32
    assert np.allclose(found, [1.0] * ones + between + [float(factor)] * ends, rtol=1e-6)


def test_llama3_rope_factors_agree_with_transformers(tmp_path):
    """By way of the file: transformers' inverse frequencies are the plain ones divided by ours."""
    folder, model = tiny.shared(Variant(rope="llama3"))
    convert(folder, tmp_path / "out")
    stored = {tensor.name: tensor for tensor in gguf_file.read_tensors(tmp_path / "out" / "decoder.gguf")}
    divisors = stored["rope_freqs.weight"].bits
    plain = 500.0 ** (-np.arange(0, 16, 2) / 16)
    wanted = model.model.language_model.rotary_emb.inv_freq.numpy()
    assert len(set(divisors.tolist())) >= 3  # the sizes were chosen to have a value between 1 and 32
    assert np.allclose(plain / divisors, wanted, rtol=1e-6)


def test_rope_interleave_on_a_picture():
    weight = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])  # two heads of width 4
    assert rope_interleave(weight, 2).ravel().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert rope_interleave(weight, 1).ravel().tolist() != rope_interleave(weight, 2).ravel().tolist()
    assert rope_interleave(weight[:, 0], 2).tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_bfloat16_rounds_as_torch_does():
    values = np.concatenate([RNG.normal(size=5000), [0.0, -0.0, 1e-40, 3.38e38, 1.00390625, 1.01171875]]).astype("f4")
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16_bits(values), wanted)
    assert not np.array_equal((values.view(np.uint32) >> 16).astype(np.uint16), wanted)  # cutting off is not rounding


def test_float16_refuses_what_does_not_fit():
    assert to_float16(np.float32([65504, 65519]), "w").tolist() == [65504, 65504]
    with pytest.raises(CheckpointError, match=r"w holds 65520"):
        to_float16(np.float32([1, -65520]), "w")


@pytest.mark.parametrize("inputs", [64, 63, 1])
def test_columns_are_quantized_each_with_its_own_scale(inputs):
    weight_KN = (RNG.normal(size=(inputs, 10)) * 10.0 ** np.arange(-5, 5)).astype("f4")
    weight_KN[:, 3] = 0
    int8_KN, scale_N = quantize_columns(weight_KN)
    assert (int8_KN.dtype, scale_N.dtype) == (np.int8, np.float32)
    assert (np.abs(int8_KN).max(axis=0) > 60).tolist() == [True] * 3 + [False] + [True] * 6
    assert (np.abs(int8_KN * scale_N - weight_KN) <= scale_N * 0.5001).all()


def test_no_pair_of_products_saturates_16_bits():
    """VPMADDUBSW adds two products of an unsigned and a signed byte into 16 bits (x86 without VNNI)."""
    plain = RNG.normal(size=(4096, 256)).astype("f4")
    plain[0:2] = 10  # the worst case: the two largest weights are neighbours

    def worst(int8_KN):
        pairs = int8_KN.astype(np.int32).reshape(-1, 2, 256)
        return max(255 * np.maximum(sign * pairs, 0).sum(axis=1).max() for sign in (1, -1))

    assert worst(quantize_columns(plain)[0]) <= 32767
    assert worst(quantize_columns(-plain)[0]) <= 32768
    naive = np.rint(plain / (np.abs(plain).max(axis=0) / 127))
    assert worst(naive) > 32767  # what is prevented really happens with one limit for each weight


# llama.cpp's quantizer


def test_recipes_are_found_in_any_case():
    assert quant.recipe("Q4_K_M").file_type == 15
    with pytest.raises(UsageError, match="q8_0"):
        quant.recipe("Q9")


SHAPES = {"token_embd.weight": (300, 256), "output_norm.weight": (256,)} | {
    f"blk.{i}.{name}.weight": shape
    for i in range(9)
    for name, shape in {"attn_v": (64, 256), "ffn_down": (256, 512), "attn_norm": (256,)}.items()
}


def test_a_model_that_llama_cpp_cannot_quantize_is_a_backend_error():
    with pytest.raises(BackendError, match="could not quantize to q8_0"):
        quant.stored_types("llama", {"general.type": "model"}, SHAPES, quant.RECIPES["q8_0"])


def test_converting_asks_for_nothing_that_only_linux_has(tmp_path, monkeypatch):
    wanted = convert(tiny.shared(Variant())[0], tmp_path / "a")
    for name in ("sched_getaffinity", "posix_fallocate", "memfd_create"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    assert convert(tiny.shared(Variant())[0], tmp_path / "b", advance=lambda *_: None) == wanted


def test_a_place_without_room_for_a_hollow_file_is_a_storage_error(monkeypatch):
    tensors = [planned("a", np.zeros(8, np.float32))]

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(StorageError, match="no room") as caught, gguf_file.hollow(b"", tensors):
        pass
    assert caught.value.code == "storage.full"


@pytest.mark.parametrize("kind", [name for name, recipe in quant.RECIPES.items() if not recipe.direct])
@pytest.mark.parametrize(
    "variant",
    [Variant(hidden=256, n_ff=512, layers=3, rope="llama3"), Variant(layers=9, tied=True, dtype=torch.bfloat16)],
    ids=["fits", "odd rows"],
)
def test_the_file_is_the_one_that_llama_cpp_quantizes(tmp_path, kind, variant):
    """Byte by byte, from our own unquantized file: header, order, types and numbers."""
    folder, _ = tiny.shared(variant)
    convert(folder, tmp_path / "out", name="x", decoder_quant=kind, fidelity_tokens=0)
    own = "bf16" if variant.dtype == torch.bfloat16 else "f32"
    convert(folder, tmp_path / "exact", name="x", decoder_quant=own, fidelity_tokens=0)
    wanted = tmp_path / "wanted.gguf"
    native = llama.library()
    params = native.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = quant.RECIPES[kind].file_type, quant.RECIPES[kind].pure, 1
    exact = tmp_path / "exact" / "decoder.gguf"
    assert native.llama_model_quantize(os.fsencode(exact), os.fsencode(wanted), ctypes.byref(params)) == 0
    found = (tmp_path / "out" / "decoder.gguf").read_bytes()
    assert found == wanted.read_bytes()
    # The twin: another recipe is another file.
    params.ftype = quant.RECIPES["q8_0" if kind != "q8_0" else "q6_k"].file_type
    assert native.llama_model_quantize(os.fsencode(exact), os.fsencode(wanted), ctypes.byref(params)) == 0
    assert found != wanted.read_bytes()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "iq4_nl"])
def test_the_recorded_error_is_that_of_the_file(tmp_path, kind):
    folder, model = tiny.shared(Variant(hidden=256, n_ff=512))
    manifest = convert(folder, tmp_path / "out", decoder_quant=kind)
    stored = {tensor.name: tensor for tensor in gguf_file.read_tensors(tmp_path / "out" / "decoder.gguf")}
    squares = np.zeros(2)
    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        for name, weight in (("attn_v", layer.self_attn.v_proj.weight), ("ffn_up", layer.mlp.up_proj.weight)):
            true = weight.detach().numpy()
            found = gguf_file.values(stored[f"blk.{i}.{name}.weight"])
            squares += ((true - found) ** 2).sum(), (true**2).sum()
    error = float(np.sqrt(squares[0] / squares[1]))
    # random matrices of one distribution lose the same within a few percent
    recorded = manifest.fidelity["decoder"]["types"][kind.upper()]["relative_error"]
    assert recorded == pytest.approx(error, rel=0.05)
    assert manifest.fidelity["decoder"]["types"]["F32"]["relative_error"] == 0
