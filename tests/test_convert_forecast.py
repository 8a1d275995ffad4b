"""--dry-run says what a conversion then does: sizes to the byte, each tensor's fate, memory within a tolerance."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import tiny_smolvlm
import tiny_text
from tiny import Variant

from edgevlm.converters import DECODER_QUANTS, convert, dry_run, gguf_file, pages
from edgevlm.errors import CheckpointError, UsageError

LARGER = Variant(hidden=256, n_ff=512, tower="clip", rope="llama3", tied=True)


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "bundle.json"}


@pytest.mark.parametrize("quant", DECODER_QUANTS)
@pytest.mark.parametrize("variant", [LARGER, Variant(dtype=tiny.torch.bfloat16)], ids=["fits", "odd rows"])
def test_decoders_have_the_size_that_was_foreseen(tmp_path, quant, variant):
    folder, _ = tiny.shared(variant)
    forecast = dry_run(folder, decoder_quant=quant)
    convert(folder, tmp_path / "out", decoder_quant=quant, fidelity_tokens=0)
    assert forecast.files == sizes(tmp_path / "out")
    stored = {t.name: t.type for t in gguf_file.read_tensors(tmp_path / "out" / "decoder.gguf")}
    assert {fate.name: fate.type for fate in forecast.tensors if fate.file == "decoder.gguf"} == stored
    # The twin: another type is another size.
    other = dry_run(folder, decoder_quant="f32" if quant != "f32" else "f16")
    assert other.files["decoder.gguf"] != forecast.files["decoder.gguf"]


CHECKPOINTS = {
    "LLaVA, CLIP": lambda: tiny.shared(Variant(tower="clip", bias=False))[0],
    "LLaVA, SigLIP": lambda: tiny.shared(Variant(feature_layer=-2))[0],
    "SmolVLM": lambda: tiny_smolvlm.shared(tiny_smolvlm.Variant())[0],
    "Llama 3.2": lambda: tiny_text.shared(tiny_text.VARIANTS["Llama 3.2"])[0],
}


@pytest.mark.parametrize("quant", ["int8", "fp32"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bundles_have_the_files_that_were_foreseen(tmp_path, kind, quant):
    folder = CHECKPOINTS[kind]()
    forecast = dry_run(folder, encoder_quant=quant)
    convert(folder, tmp_path / "out", encoder_quant=quant, fidelity_tokens=0, force=True)
    assert forecast.files == sizes(tmp_path / "out")
    assert forecast.total_bytes == sum(sizes(tmp_path / "out").values())
    assert forecast.disk_bytes > forecast.total_bytes
    if "encoder.onnx" not in forecast.files:
        assert forecast.encoder_quant is None
        return
    graph = onnx.load(tmp_path / "out" / "encoder.onnx", load_external_data=False).graph
    kinds = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.INT8: "I8"}
    stored = {t.name: kinds[t.data_type] for t in graph.initializer if t.data_type in kinds}
    found = {fate.name: fate.type for fate in forecast.tensors if fate.file == "encoder.onnx"}
    assert found.items() <= stored.items()
    constants = {name for name in stored if name not in found}
    assert all(not np.any(_values(graph, name, tmp_path / "out")) for name in constants), constants


def _values(graph, name, folder):
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor, str(folder))


def test_every_tensor_of_the_checkpoint_has_a_fate():
    folder, _ = tiny.shared(LARGER)
    forecast = dry_run(folder)
    named = Counter(source for fate in forecast.tensors for source in fate.sources)
    assert set(named) == set(tiny.load_file(folder / "model.safetensors"))
    fates = {fate.sources: fate for fate in forecast.tensors if fate.file == "decoder.gguf"}
    assert fates[()].name == "rope_freqs.weight"
    q = next(fate for sources, fate in fates.items() if "layers.0.self_attn.q_proj" in "".join(sources))
    assert (q.name, q.source_type, q.type, q.shape) == ("blk.0.attn_q.weight", "F32", "Q4_K", (256, 256))
    joined = next(fate for fate in forecast.tensors if fate.name == "tower.blk.0.qkv.weight.int8")
    assert [name.rpartition(".self_attn.")[2] for name in joined.sources] == [f"{part}_proj.weight" for part in "qkv"]
    lost = [fate.sources[0] for fate in forecast.tensors if not fate.file]
    assert lost
    assert all("post_layernorm" in name for name in lost)


def test_what_cannot_be_converted_cannot_be_foreseen(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    with pytest.raises(UsageError, match="decoder_quant is 'q9'"):
        dry_run(folder, decoder_quant="q9")
    tiny.rewrite_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(CheckpointError) as caught:
        dry_run(folder)
    assert caught.value.code == "checkpoint.missing_tensor"


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "edgevlm", "convert", *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip


def test_a_dry_run_writes_nothing_and_prints_a_table_or_json(tmp_path):
    folder, _ = tiny.shared(LARGER)
    before = {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    table = run(folder, tmp_path / "out", "--dry-run")
    printed = json.loads(run(folder, tmp_path / "out", "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()} == before
    assert table.stderr == ""
    assert f"{printed['total_bytes']:,} bytes" in table.stdout
    assert printed["files"] == dry_run(folder).files
    for fate in printed["tensors"]:
        assert all(source in table.stdout for source in fate["sources"])


#: Of the measured peak. What numpy, llama.cpp and ONNX Runtime take for themselves is most of it for a model this
#: small, and differs by tens of megabytes with versions and the number of processors.
TOLERANCE = 0.35


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 300])
def test_the_peak_of_memory_is_about_the_foreseen_one(tmp_path, tokens):
    folder, _ = tiny.shared(Variant(hidden=512, n_ff=2048, layers=4))
    options = ("--fidelity-tokens", tokens, "--force")
    foreseen = json.loads(run(folder, tmp_path / "out", *options, "--dry-run", "--json").stdout)["memory_bytes"]
    said = run(folder, tmp_path / "out", *options).stderr
    measured = float(said.rpartition("at most ")[2].split(" MB")[0]) * 1e6
    assert foreseen == pytest.approx(measured, rel=TOLERANCE)


# pages of mapped files


def test_pages_are_given_back_and_can_be_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (40 << 12))
    with open(path, "rb") as file:
        mapped = pages.mmap.mmap(file.fileno(), 0, access=pages.mmap.ACCESS_READ)
    view = np.frombuffer(mapped, np.uint8, offset=100)[: 39 << 20].view("<u2").reshape(-1, 8)
    total = int(view.sum(dtype=np.int64))
    held = pages._resident_files()
    pages.release(view)
    assert held - pages._resident_files() >= 38 << 20
    assert int(view.sum(dtype=np.int64)) == total
    assert pages._resident_files() >= held - (1 << 20)


def test_arrays_that_are_no_mapped_files_keep_what_they_hold():
    array = np.full(1 << 20, 7, np.uint8)
    for view in (array, array[100:], array[::2], array[:0]):
        pages.release(view)
    assert (array == 7).all()


def test_pages_of_files_that_others_map_are_bounded(tmp_path, monkeypatch):
    """Whoever maps them, here numpy in a way that `release` does not know."""
    monkeypatch.setattr(pages, "LIMIT_BYTES", 0)
    path = tmp_path / "file"
    path.write_bytes(bytes(40 << 20))
    data = np.memmap(path, np.uint8, "r")
    before = pages._resident_files()
    assert not data.any()
    assert pages._resident_files() - before >= 39 << 20
    with pages.bounded(path):
        for _ in range(100):
            if pages._resident_files() - before < 4 << 20:
                break
            pages.threading.Event().wait(0.02)
    assert pages._resident_files() - before < 4 << 20
    assert not data.any()
