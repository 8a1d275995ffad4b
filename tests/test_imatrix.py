"""Importance matrices: both forms steer llama.cpp's quantizer exactly as its own tools do, and nothing else passes."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
import toy_gguf
from tiny import Variant

from edgevlm import converters
from edgevlm.converters import convert, gguf_file
from edgevlm.converters.imatrix import read_imatrix
from edgevlm.errors import FileError, ImatrixError, UsageError

# Eight blocks: from there on llama.cpp stores the first down projections of Q4_0 as Q4_1 when it has a matrix.
DEEP = Variant(hidden=256, n_ff=256, layers=8)
WIDTHS = {"token_embd.weight": 64, "blk.0.attn_q.weight": 64, "blk.0.ffn_down.weight": 96}
BLOCK = {name: width for name, width in WIDTHS.items() if name.startswith("blk.")}


def widths_of(variant):
    path = Path(tiny.shared(variant)[0])
    sources = converters.decoder.gguf_decoder.sources(converters.huggingface.read(path, "x", None).mapped)
    return {name: source.tensor.shape[-1] for name, source in sources.items() if len(source.tensor.shape) > 1}


def importance(widths, seed=3):
    """Uneven numbers, as real ones are: a few inputs matter a thousand times more than others."""
    rng = np.random.default_rng(seed)
    return {name: np.exp(rng.normal(0, 2, width)).astype(np.float32) for name, width in widths.items()}


def write_gguf(path, entries, counts=1000, kind="imatrix", extra=()):
    """The present form: `entries` are sums over `counts` tokens."""
    tensors, data, offset = [], b"", 0
    for name, values in entries.items():
        for suffix, numbers in ((".in_sum2", values), (".counts", np.array([counts]))):
            raw = np.asarray(numbers, "<f4").tobytes()
            tensors.append((name + suffix, (len(raw) // 4,), 0, offset, 0))
            padded = raw + b"\0" * (-len(raw) % 32)
            data, offset = data + padded, offset + len(padded)
    for name, dims, type_id, nbytes in extra:
        tensors.append((name, dims, type_id, offset, 0))
        padded = bytes(nbytes + -nbytes % 32)
        data, offset = data + padded, offset + len(padded)
    metadata = {
        "general.type": (toy_gguf.STR, kind),
        "imatrix.datasets": (toy_gguf.ARR, toy_gguf.STR, ["wiki.txt"]),
        "imatrix.chunk_count": (toy_gguf.U32, 2),
        "imatrix.chunk_size": (toy_gguf.U32, 512),
    }
    path.write_bytes(toy_gguf.build(metadata, tensors) + data)
    return path


DATA_SET = struct.pack("<ii", 7, 8) + b"wiki.txt"  # the number of chunks, and which file they came from


def legacy(entries, calls=7, tail=DATA_SET):
    """The old form: each value is already multiplied by the number of calls."""
    out = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw = np.asarray(values, "<f4")
        encoded = name.encode()
        out += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, raw.size) + raw.tobytes()
    return out + tail


def expected_bytes(kind, values_RD, weights):
    """One matrix quantized by ggml itself, outside of llama.cpp's quantizer."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    out = np.zeros(values_RD.nbytes, np.uint8)
    rows, width = values_RD.shape
    weights_at = None if weights is None else weights.ctypes.data
    type_id = getattr(llama_cpp.llama_cpp, f"GGML_TYPE_{kind}")
    nbytes = library.ggml_quantize_chunk(type_id, values_RD.ctypes.data, out.ctypes.data, 0, rows, width, weights_at)
    return out[:nbytes].tobytes()


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf_file.read_tensors(path)}


@pytest.mark.parametrize(("form", "quant"), [("gguf", "q4_k_m"), ("legacy", "q4_0")])
def test_every_matrix_is_quantized_with_its_own_importance(tmp_path, form, quant):
    folder, _ = tiny.shared(DEEP)
    entries = importance({name: width for name, width in widths_of(DEEP).items() if name.startswith("blk.")})
    path = tmp_path / "imatrix"
    if form == "gguf":
        write_gguf(path, {name: values * np.float32(1024) for name, values in entries.items()}, counts=1024)
    else:
        path.write_bytes(legacy({name: values * np.float32(8) for name, values in entries.items()}, calls=8))
    manifest = convert(
        folder, tmp_path / "out", decoder_quant=quant, encoder_quant="fp32", imatrix=path, fidelity_tokens=0
    )
    convert(folder, tmp_path / "exact", decoder_quant="f32", encoder_quant="fp32")
    exact, found = (tensors_of(tmp_path / name / "decoder.gguf") for name in ("exact", "out"))
    seen = 0
    for name, tensor in found.items():
        if tensor.type != "F32":
            values_RD = np.ascontiguousarray(exact[name].bits)
            assert tensor.bits.tobytes() == expected_bytes(tensor.type, values_RD, entries.get(name)), name
            # The twins: no importance, and that of the inputs in reverse, give other bytes.
            for other in (None, entries[name][::-1].copy()) if name in entries else ():
                assert tensor.bits.tobytes() != expected_bytes(tensor.type, values_RD, other), name
            seen += name in entries
    assert seen == len(entries) == 7 * DEEP.layers
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.provenance["imatrix"] == {"name": "imatrix", "sha256": digest}


def test_q4_0_stays_pure_with_an_importance_matrix(tmp_path):
    folder, _ = tiny.shared(DEEP)
    path = write_gguf(tmp_path / "imatrix.gguf", importance(widths_of(DEEP)))
    convert(folder, tmp_path / "out", decoder_quant="q4_0", encoder_quant="fp32", imatrix=path, fidelity_tokens=0)
    assert {tensor.type for tensor in tensors_of(tmp_path / "out" / "decoder.gguf").values()} == {"F32", "Q4_0"}
    # The twin: without `pure`, llama.cpp brings in Q4_1, which has no repacked kernel.
    recipe = converters.quant.RECIPES["q4_0"]
    object.__setattr__(recipe, "pure", False)
    try:
        manifest = convert(
            folder, tmp_path / "mixed", decoder_quant="q4_0", encoder_quant="fp32", imatrix=path, fidelity_tokens=0
        )
    finally:
        object.__setattr__(recipe, "pure", True)
    assert manifest.fidelity["decoder"]["replaced"] == {
        "blk.0.ffn_down.weight": "Q4_1 (llama.cpp's own choice for this tensor)",
        "output.weight": "Q6_K (llama.cpp's own choice for this tensor)",
    }


def test_the_two_forms_say_the_same(tmp_path):
    values = importance(WIDTHS)
    new = write_gguf(tmp_path / "a.gguf", {name: v * np.float32(512) for name, v in values.items()}, counts=512)
    old = tmp_path / "b.dat"
    old.write_bytes(legacy({name: v * np.float32(4) for name, v in values.items()}, calls=4))
    for path in (new, old):
        found = read_imatrix(path, WIDTHS).values
        assert set(found) == set(WIDTHS)
        assert all(np.array_equal(found[name], values[name]) for name in WIDTHS)


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 3), struct.pack("<ii", 3, 0)])
def test_what_old_versions_leave_out_is_not_missed(tmp_path, tail):
    path = tmp_path / "old"
    path.write_bytes(legacy(importance(BLOCK), tail=tail))
    assert set(read_imatrix(path, WIDTHS).values) == set(BLOCK)


# what is refused

ONES = {name: np.ones(width, np.float32) for name, width in BLOCK.items()}


def spoiled(name, value):
    entries = {key: values.copy() for key, values in ONES.items()}
    entries[name][5] = value
    return entries


OTHERS = {
    "the model has no": {**ONES, "blk.7.attn_q.weight": np.ones(64)},
    "it has nothing about": {"blk.0.attn_q.weight": np.ones(64)},
    "this model's rows have 96": {**ONES, "blk.0.ffn_down.weight": np.ones(97)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_matrix_of_another_model_is_refused_with_the_names(tmp_path, case):
    (tmp_path / "old").write_bytes(legacy(OTHERS[case]))
    for path in (write_gguf(tmp_path / "new", OTHERS[case]), tmp_path / "old"):
        with pytest.raises(ImatrixError, match=case.replace("the model", "this model")) as caught:
            read_imatrix(path, WIDTHS)
        assert caught.value.code == "imatrix.mismatch"
        assert ".weight" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-30, 1.1e12])
def test_numbers_that_would_poison_the_quantizer_are_refused(tmp_path, value):
    entries = spoiled("blk.0.attn_q.weight", value)
    (tmp_path / "old").write_bytes(legacy(entries, calls=1))
    for path in (write_gguf(tmp_path / "new", entries, counts=1), tmp_path / "old"):
        with pytest.raises(ImatrixError, match=r"blk\.0\.attn_q\.weight has a value") as caught:
            read_imatrix(path, WIDTHS)
        assert caught.value.code == "imatrix.invalid"


def test_a_matrix_that_says_nothing_is_refused(tmp_path):
    entries = {**ONES, "blk.0.attn_q.weight": np.zeros(64)}
    (tmp_path / "old").write_bytes(legacy(entries))
    for path in (write_gguf(tmp_path / "new", entries), tmp_path / "old"):
        with pytest.raises(ImatrixError, match="zero throughout"):
            read_imatrix(path, WIDTHS)


@pytest.mark.parametrize("count", [0, -1, 0.5, np.nan, np.inf])
def test_counts_that_count_nothing_are_refused(tmp_path, count):
    with pytest.raises(ImatrixError, match="tokens"):
        read_imatrix(write_gguf(tmp_path / "new", ONES, counts=count), WIDTHS)


def test_gguf_files_of_another_kind_are_refused(tmp_path):
    sum2 = ("x.weight.in_sum2", (64,), 0, 256)
    files = {
        "general.type is 'model'": write_gguf(tmp_path / "a", ONES, kind="model"),
        "of another kind": write_gguf(tmp_path / "b", ONES, extra=[("token_embd.weight", (64,), 0, 256)]),
        "do not both exist for x.weight": write_gguf(tmp_path / "c", ONES, extra=[sum2]),
        "must be F32": write_gguf(
            tmp_path / "d", ONES, extra=[("x.weight.in_sum2", (64,), 1, 128), ("x.weight.counts", (1,), 0, 4)]
        ),
        "several matrices": write_gguf(
            tmp_path / "e",
            {"blk.0.ffn_down.weight": ONES["blk.0.ffn_down.weight"]},
            extra=[("blk.0.attn_q.weight.in_sum2", (64, 2), 0, 512), ("blk.0.attn_q.weight.counts", (1, 2), 0, 8)],
        ),
    }
    for words, path in files.items():
        with pytest.raises(ImatrixError, match=words):
            read_imatrix(path, WIDTHS)
    (tmp_path / "empty.gguf").write_bytes(toy_gguf.build({"general.type": (toy_gguf.STR, "imatrix")}, []))
    with pytest.raises(ImatrixError, match="of another kind"):
        read_imatrix(tmp_path / "empty.gguf", WIDTHS)


def test_no_damage_of_either_form_escapes(tmp_path):
    """Cut anywhere, or one number of the structure replaced by one of the usual suspects: our error, and only it."""
    whole_new = write_gguf(tmp_path / "new", ONES).read_bytes()
    whole_old = legacy(ONES)
    path = tmp_path / "damaged"
    numbers = [struct.pack("<i", n) for n in (-1, 0, 1 << 30, (1 << 31) - 1, -(1 << 31))]
    refused = 0
    for whole, step in ((whole_new, 7), (whole_old, 2)):
        cuts = [whole[:n] for n in range(0, len(whole), step)]
        # every place of the headers; of the values behind them a damage is a value
        patches = [whole[:i] + number + whole[i + 4 :] for i in range(0, 700, step) for number in numbers]
        for data in cuts + patches:
            path.write_bytes(data)
            try:
                read_imatrix(path, WIDTHS)
            except ImatrixError:
                refused += 1
    assert refused > 1000
    for extra in (b"x", b"\0" * 64):
        path.write_bytes(whole_old + extra)
        with pytest.raises(ImatrixError, match="follow its end"):
            read_imatrix(path, WIDTHS)


def test_twice_the_same_name_is_refused(tmp_path):
    entry = legacy({"blk.0.attn_q.weight": np.ones(64)}, tail=b"")[4:]
    (tmp_path / "old").write_bytes(struct.pack("<i", 2) + entry + entry)
    with pytest.raises(ImatrixError, match="appears twice"):
        read_imatrix(tmp_path / "old", WIDTHS)


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileError):
            read_imatrix(path, WIDTHS)


def test_nothing_is_written_when_the_matrix_cannot_be_used(tmp_path):
    folder, _ = tiny.shared(Variant())
    other = write_gguf(tmp_path / "other.gguf", ONES)
    with pytest.raises(ImatrixError, match="another model"):
        convert(folder, tmp_path / "out", imatrix=other)
    with pytest.raises(UsageError, match="f16 only rounds, an importance matrix"):
        convert(folder, tmp_path / "out", decoder_quant="f16", imatrix=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf"]
