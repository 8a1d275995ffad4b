"""pytorch_model.bin: the same bundle as from safetensors, and pickles that want more than to be read."""

from __future__ import annotations

import builtins
import collections
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Variant

from edgevlm.converters import convert
from edgevlm.converters.safetensors import open_file as open_safetensors
from edgevlm.converters.torch_pickle import open_file
from edgevlm.errors import CheckpointError

STATE = collections.OrderedDict(
    a=torch.arange(12, dtype=torch.float32).reshape(3, 4), b=torch.ones(5, dtype=torch.bfloat16),
    c=torch.tensor(3), d=torch.zeros(0, 4, dtype=torch.float16),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with pytorch_model.bin in place of safetensors."""
    folder = tiny.copy(Variant(dtype=torch.bfloat16), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_it_gives_the_files_of_safetensors(folder, tmp_path):
    wanted = convert(tiny.shared(Variant(dtype=torch.bfloat16))[0], tmp_path / "a", decoder_quant="q8_0", name="x")
    found = convert(folder, tmp_path / "b", decoder_quant="q8_0", name="x")
    assert found.files == wanted.files
    assert "pytorch_model.bin" in found.provenance["source_files"]
    rest = [
        {key: value for key, value in manifest.provenance.items() if key not in ("source_files", "source")}
        for manifest in (found, wanted)
    ]
    assert (rest[0], found.fidelity) == (rest[1], wanted.fidelity)


def test_shards_give_the_same_files(folder, tmp_path):
    wanted = convert(folder, tmp_path / "a", decoder_quant="q8_0")
    state = torch.load(folder / "pytorch_model.bin")
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, chosen in parts.items():
        torch.save({name: state[name] for name in chosen}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index))
    found = convert(folder, tmp_path / "b", decoder_quant="q8_0")
    assert found.files == wanted.files
    assert set(parts) | {path.name} <= set(found.provenance["source_files"])
    index["weight_map"][names[0]] = "../model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="odd file"):
        convert(folder, tmp_path / "c")


def test_safetensors_come_first(folder, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(
        (tiny.shared(Variant(dtype=torch.bfloat16))[0] / "model.safetensors").read_bytes()
    )
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    found = convert(folder, tmp_path / "b")
    assert "pytorch_model.bin" not in found.provenance["source_files"]


def saved(tmp_path, state=STATE, **options):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_and_shape(tmp_path, protocol):
    found = open_file(saved(tmp_path, pickle_protocol=protocol))
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        assert found[name].shape == tuple(tensor.shape)
        bits = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        np.testing.assert_array_equal(found[name].bits, bits)
        assert found[name].bits.dtype == bits.dtype
        assert not found[name].bits.flags.writeable
    assert [tensor.dtype for tensor in found.values()] == ["F32", "BF16", "I64", "F16"]
    assert [tensor.usable for tensor in found.values()] == [True, True, False, True]
    assert not np.array_equal(found["a"].bits, STATE["a"].numpy() + 1e-6)


def test_a_state_dict_of_a_module_with_parameters(tmp_path):
    """`state_dict()` carries `_metadata`, and a dict of parameters another call."""
    layer = torch.nn.Linear(3, 2)
    for state in (layer.state_dict(), dict(layer.named_parameters())):
        found = open_file(saved(tmp_path, state))
        np.testing.assert_array_equal(found["weight"].bits, layer.weight.detach().numpy())


def test_tensors_may_share_a_storage(tmp_path):
    whole = torch.arange(12.0)
    found = open_file(saved(tmp_path, {"x": whole[:6].view(2, 3), "y": whole[6:], "tied": whole[:6].view(2, 3)}))
    np.testing.assert_array_equal(found["x"].bits, found["tied"].bits)
    np.testing.assert_array_equal(found["y"].bits, np.arange(6, 12))
    with pytest.raises(CheckpointError, match="overlap in part"):
        open_file(saved(tmp_path, {"x": whole[:7], "y": whole[6:]}))


def test_transposed_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"strides \(1, 4\) instead of \(3, 1\)") as caught:
        open_file(saved(tmp_path, {"x": torch.zeros(3, 4).T}))
    assert caught.value.code == "checkpoint.unsupported"
    assert open_file(saved(tmp_path, {"x": torch.zeros(3, 1).T}))["x"].shape == (1, 3)  # no stride matters for 1


def test_the_oldest_format_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        open_file(saved(tmp_path, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize("state", [STATE["a"], {}, {"a": 1}, {"a": {"b": STATE["a"]}}, [STATE["a"]], {1: STATE["a"]},
                                   {"a\n": STATE["a"]}, {"": STATE["a"]}])  # fmt: skip
def test_other_things_that_torch_saves_are_refused(tmp_path, state):
    with pytest.raises(CheckpointError):
        open_file(saved(tmp_path, state))


# hostile pickles


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


def packed(tmp_path, raw, **entries):
    """An archive as torch writes it, around any pickle."""
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", raw)
        for name, data in {"data/0": bytes(16), **entries}.items():
            archive.writestr(f"x/{name}", data)
    return path


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _storage(kind=b"ctorch\nFloatStorage\n", key="0", count=b"K\x04"):
    return b"(" + _text("storage") + kind + _text(key) + _text("cpu") + count + b"tQ"


def _tensor(
    storage=None, offset=b"K\x00", shape=b"K\x04\x85", strides=b"K\x01\x85", rest=b"\x89ccollections\nOrderedDict\n)R"
):
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + (_storage() if storage is None else storage) + offset + shape + strides + rest + b"tR"


def _state(value):
    return b"\x80\x02}" + _text("w") + value + b"s."


def test_the_hand_made_pickle_is_sound(tmp_path):
    """What all the damaged ones below differ from."""
    assert open_file(packed(tmp_path, _state(_tensor())))["w"].shape == (4,)


def _attacks(canary):
    touch = f"touch {canary}"
    pairs = [("a", Call(os.system, touch))]
    code = f"open({str(canary)!r}, 'w')"
    evil = {
        "os.system": Call(os.system, touch), "eval": Call(eval, code), "exec": Call(exec, code),
        "open": Call(open, str(canary), "w"), "getattr": Call(getattr, os, "system"),
        "import": Call(builtins.__import__, "os"), "nested": Call(collections.OrderedDict, pairs),
    }  # fmt: skip
    raws = {f"{name}, protocol {p}": pickle.dumps({"w": call}, p) for name, call in evil.items() for p in (2, 4)
            if name != "getattr"}  # fmt: skip
    command = _text(touch)
    return raws | {
        "protocol 0": pickle.dumps(Call(os.system, touch), 0),
        "a name alone": b"\x80\x02cos\nsystem\n.",
        "posix": b"\x80\x02cposix\nsystem\n" + command + b"\x85R.",
        "stack global": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + command + b"\x85R.",
        "a dotted name": b"\x80\x04" + _text("collections") + _text("OrderedDict.__init__.__globals__") + b"\x93.",
        "a name over lines": b"\x80\x02ctorch\n_utils._rebuild_tensor_v2.__globals__\n.",
        "torch.load": b"\x80\x02ctorch\nload\n" + command + b"\x85R.",
        "inst": b"\x80\x02(" + command + b"ios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + command + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + command + b"\x85\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id of protocol 0": b"\x80\x02Pos.system\n.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "call of a tensor": _state(_tensor() + b")R"),
        "call of a storage type": _state(b"ctorch\nFloatStorage\n)R"),
        "attributes of a tensor": _state(_tensor() + b"}b"),
        "attributes of a name": b"\x80\x02ccollections\nOrderedDict\n}" + _text("__init__") + b"Nsb.",
        "a name as a key": b"\x80\x02}ctorch\nFloatStorage\nNs.",
        "a storage that is a module": _state(_tensor(_storage().replace(b"storage", b"modules"))),
        "pairs for the dict": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "a dict in itself": b"\x80\x02}q\x00" + _text("w") + b"h\x00s.",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "dup": b"\x80\x02}2s.",
        "a memo index of 4 billion": b"\x80\x02}r\xff\xff\xff\xff0.",
        "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
        "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    }  # fmt: skip


def test_no_pickle_is_ever_executed(tmp_path):
    canary = tmp_path / "canary"
    attacks = _attacks(canary)
    assert len(attacks) > 35
    for name, raw in attacks.items():
        path = packed(tmp_path, raw)
        with pytest.raises(CheckpointError) as caught:
            open_file(path)
        assert caught.value.code in ("checkpoint.unsupported", "checkpoint.invalid"), name
        assert not canary.exists(), name
    # The twin: what Python itself makes of one of them.
    pickle.loads(attacks["os.system, protocol 2"])
    assert canary.exists()


def test_the_refusal_names_what_was_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing of it was run") as caught:
        open_file(packed(tmp_path, pickle.dumps({"w": Call(os.system, "true")}, 2)))
    assert caught.value.code == "checkpoint.unsupported"


def test_a_hostile_checkpoint_leaves_nothing_behind(folder, tmp_path):
    canary = tmp_path / "canary"
    packed(folder, pickle.dumps({"w": Call(os.system, f"touch {canary}")}))
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


LIES = {
    "a missing storage": _tensor(_storage(key="1")),
    "a storage outside the folder": _tensor(_storage(key="../../etc/passwd")),
    "a storage that is larger": _tensor(_storage(count=b"K\x05")),
    "a storage that is smaller": _tensor(_storage(count=b"K\x03")),
    "a negative storage": _tensor(_storage(count=b"J\xff\xff\xff\xff")),
    "a storage of True numbers": _tensor(_storage(count=b"\x88")),
    "wider numbers": _tensor(_storage(b"ctorch\nDoubleStorage\n")),
    "an offset behind the end": _tensor(offset=b"K\x01"),
    "a negative offset": _tensor(offset=b"J\xff\xff\xff\xff"),
    "a huge offset": _tensor(offset=b"\x8a\x09" + b"\xff" * 8 + b"\0"),
    "a shape behind the end": _tensor(shape=b"K\x05\x85"),
    "a negative axis": _tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "axes whose product overflows": _tensor(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x87",
                                            strides=b"\x8a\x09\x01" + bytes(8) + b"K\x01K\x01\x87"),
    "no stride": _tensor(strides=b")"),
    "a stride of zero": _tensor(strides=b"K\x00\x85"),
    "a shape that is a list": _tensor(shape=b"]K\x04a"),
    "nine axes": _tensor(shape=b"(" + b"K\x01" * 9 + b"t", strides=b"(" + b"K\x01" * 9 + b"t"),
    "a text for a storage": _tensor(_text("0")),
    "too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "a parameter of nothing": b"ctorch._utils\n_rebuild_parameter\nN\x85R",
    "one name twice": _tensor() + b"s" + _text("w") + _tensor(),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_tensors_that_are_not_there(tmp_path, name):
    with pytest.raises(CheckpointError):
        open_file(packed(tmp_path, _state(LIES[name])))


def test_one_storage_with_two_types(tmp_path):
    half = _tensor(_storage(b"ctorch\nHalfStorage\n", count=b"K\x08"), shape=b"K\x08\x85")
    raw = _state(_tensor() + b"s" + _text("v") + half)
    with pytest.raises(CheckpointError, match="another type or size"):
        open_file(packed(tmp_path, raw))


# archives


@pytest.mark.parametrize(
    "entries",
    [{"data/1": b"unused"}, {"code/x.py": b"pass"}, {"byteorder": b"big"}, {"constants.pkl": b"N."},
     {"data.pkl/x": b""}],
    ids=str,
)  # fmt: skip
def test_archives_with_more_than_a_state_dict(tmp_path, entries):
    with pytest.raises(CheckpointError):
        open_file(packed(tmp_path, _state(_tensor()), **entries))


def _zip(build):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        build(archive)
    return buffer.getvalue()


def _compressed(archive):
    archive.writestr("x/data.pkl", _state(_tensor()))
    archive.writestr("x/data/0", bytes(16), zipfile.ZIP_DEFLATED)


def _bomb(archive):
    archive.writestr("x/data.pkl", b"\x80\x02." + bytes(1 << 22), zipfile.ZIP_DEFLATED)


def _twice(archive):
    archive.writestr("x/data.pkl", _state(_tensor()))
    archive.writestr("x/data/0", bytes(16))
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data/0", bytes(range(16)))


def _two_folders(archive):
    archive.writestr("x/data.pkl", _state(_tensor()))
    archive.writestr("y/data/0", bytes(16))


@pytest.mark.parametrize("build", [_compressed, _bomb, _twice, _two_folders, lambda archive: None])
def test_archives_that_torch_does_not_write(tmp_path, build):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(_zip(build))
    with pytest.raises(CheckpointError) as caught:
        open_file(path)
    assert caught.value.code == "checkpoint.invalid"


def test_a_large_archive_of_64_bits(tmp_path):
    """zip64, as torch writes it beyond 4 GB: the same archive with every size in its 64-bit field."""
    path = packed(tmp_path, _state(_tensor()))
    raw = path.read_bytes()
    start = struct.unpack_from("<I", raw, len(raw) - 6)[0]
    entries, directory, position = 0, b"", start
    while raw[position : position + 4] == b"PK\1\2":
        fields = bytearray(raw[position : position + 46])
        name = raw[position + 46 : position + 46 + struct.unpack_from("<H", fields, 28)[0]]
        packed_size, size, begin = *struct.unpack_from("<2I", fields, 20), struct.unpack_from("<I", fields, 42)[0]
        struct.pack_into("<2I", fields, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<I", fields, 42, 0xFFFFFFFF)
        extra = struct.pack("<2H3Q", 1, 24, size, packed_size, begin)
        struct.pack_into("<H", fields, 30, len(extra))
        directory += bytes(fields) + name + extra
        position += 46 + len(name)
        entries += 1
    end = start + len(directory)
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    final = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(raw[:start] + directory + record + locator + final)
    assert open_file(path)["w"].shape == (4,)
    damaged = path.read_bytes().replace(b"PK\6\6", b"PK\6\5")
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="zip64"):
        open_file(path)


def test_every_cut_and_every_flipped_bit(tmp_path):
    """Either an error of ours or tensors within the file; never anything else."""
    path = saved(tmp_path)
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_file(path)
    for junk in (raw + b"x", b"x" + raw):
        path.write_bytes(junk)
        with pytest.raises(CheckpointError):
            open_file(path)
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        try:
            found = open_file(path)
        except CheckpointError:
            continue
        assert sum(tensor.bits.nbytes for tensor in found.values()) <= len(raw)


def test_overlapping_entries(tmp_path):
    """Two names for the same bytes."""
    path = packed(tmp_path, _state(_tensor()), **{"data/1": bytes(16)})
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\1\2")
    other = raw.rindex(b"PK\1\2", 0, place)
    raw[place + 42 : place + 46] = raw[other + 42 : other + 46]
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="contradicts the directory"):
        open_file(path)


def test_a_file_that_is_no_archive(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for raw in (b"", b"PK\5\6" + bytes(18), os.urandom(500), pickle.dumps({}), Path(__file__).read_bytes()):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            open_file(path)


def test_both_readers_give_the_same_tensors(folder):
    wanted = open_safetensors(tiny.shared(Variant(dtype=torch.bfloat16))[0] / "model.safetensors")
    found = open_file(folder / "pytorch_model.bin")
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        np.testing.assert_array_equal(tensor.bits, wanted[name].bits)
