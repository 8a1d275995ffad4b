"""The safetensors reader: every rule of the format has a file that breaks it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgevlm.converters import safetensors
from edgevlm.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header, data=bytes(8), claimed=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def entry(**changes):
    return {"a": {**ENTRY, **changes}}


BAD = {
    "empty file": b"",
    "eight bytes": bytes(8),
    "header length 0": bytes(9),
    "header longer than the file": raw(entry(), claimed=10_000),
    "header length 2^64 - 1": raw(entry(), claimed=2**64 - 1),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "not JSON": raw(b"{nope"),
    "not an object": raw(b'["a"]'),
    "leading space": raw(b" " + json.dumps(entry()).encode()),
    "depth bomb": raw(b'{"a":' + b"[" * 100_000),
    "no tensors": raw({}, b""),
    "duplicate tensor": raw(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}"),
    "duplicate metadata": raw(b'{"__metadata__":{"x":"1","x":"2"},"a":' + json.dumps(ENTRY).encode() + b"}"),
    "metadata of numbers": raw({"__metadata__": {"x": 1}, **entry()}),
    "metadata is a list": raw({"__metadata__": [], **entry()}),
    "entry is a list": raw({"a": [1]}),
    "entry lacks shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "entry has more": raw(entry(extra=1)),
    "unknown dtype": raw(entry(dtype="F128")),
    "dtype is a list": raw(entry(dtype=["F32"])),
    "negative size": raw(entry(shape=[-2])),
    "size is a float": raw(entry(shape=[2.0])),
    "size is a bool": raw(entry(shape=[True, 2])),
    "huge product": raw(entry(shape=[2**32, 2**32])),
    "65 axes": raw(entry(shape=[1] * 64 + [2])),
    "shape needs more bytes": raw(entry(shape=[3])),
    "begin after end": raw(entry(data_offsets=[8, 0])),
    "offset negative": raw(entry(data_offsets=[-8, 0])),
    "offset is a float": raw(entry(data_offsets=[0.0, 8])),
    "offset is a text": raw(entry(data_offsets=["0", 8])),
    "three offsets": raw(entry(data_offsets=[0, 8, 8])),
    "does not begin at 0": raw(entry(data_offsets=[4, 12]), bytes(12)),
    "hole": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
    "overlap": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "end beyond the file": raw(entry(), bytes(4)),
    "bytes behind the last tensor": raw(entry(), bytes(12)),
    "name with NUL": raw({"a\0": ENTRY}),
    "name of 10 KB": raw({"a" * 10_000: ENTRY}),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(CheckpointError) as caught:
        safetensors.open_file(path)
    assert caught.value.code == "checkpoint.invalid"
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = raw({"a": ENTRY, "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}, bytes(range(16)))
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            safetensors.open_file(path)
    path.write_bytes(whole)
    assert set(safetensors.open_file(path)) == {"a", "b"}


def test_values_equal_those_of_the_reference_reader(tmp_path):
    path = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randn(5, 7, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ids": torch.arange(9)}
    save_file(tensors, path)
    found = safetensors.open_file(path)
    assert set(found) == set(tensors)
    for name in ("float32", "float16", "bfloat16", "scalar", "empty"):
        assert np.array_equal(safetensors.widen(found[name]), tensors[name].float().numpy()), name
        assert found[name].usable
    assert np.array_equal(found["ids"].bits, np.arange(9))
    assert not found["ids"].usable


def test_bfloat16_keeps_its_special_values(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([float("inf"), -0.0, 1e-40, 3.3895314e38], dtype=torch.bfloat16)}, path)
    values = safetensors.widen(safetensors.open_file(path)["a"])
    assert np.isposinf(values[0])
    assert np.signbit(values[1])
    assert values[3] == np.float32(3.3895314e38)
