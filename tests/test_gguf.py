"""The header check in front of llama.cpp: what it accepts, what it refuses, and that nothing else ever happens."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from toy_gguf import ARR, BOOL, F32, I32, STR, TENSORS, U32, VALID, build

from edgevlm.errors import EdgeVLMError, FileError, GGUFError
from edgevlm.gguf import read_header


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_reads_a_valid_header(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, build()))
    assert header.context_length == 128
    assert header.token("bos") == "<s>"
    assert header.token("eos") == ""
    assert header.chat_template == "{{ messages[0].content }}"
    assert [(t.name, t.shape, t.nbytes) for t in header.tensors] == [
        ("token_embd.weight", (3, 64), 768),
        ("output_norm.weight", (64,), 256),
    ]
    assert header.data_offset % 32 == 0


def test_reads_a_real_file(smollm2: Path) -> None:
    header = read_header(smollm2)
    assert header.metadata["llama.block_count"] == 30
    assert len(header.tensors) == 272
    assert header.token("eos") == "<|im_end|>"


def with_key(key: str, *value: object) -> bytes:
    return build({**VALID, key: value})


def with_tensor(*tensor: object) -> bytes:
    return build(tensors=[tensor, *TENSORS[1:]])  # type: ignore[list-item]


BAD = {
    "empty": (b"", "gguf.invalid"),
    "only the magic": (b"GGUF", "gguf.invalid"),
    "another magic": (build(magic=b"GGJT"), "gguf.invalid"),
    "version 1": (build(version=1), "gguf.unsupported"),
    "big-endian": (build(version=3 << 24), "gguf.unsupported"),
    "a key too many": (build(n_kv=len(VALID) + 1), "gguf."),
    "2^63 keys": (build(n_kv=1 << 63), "gguf.invalid"),
    "2^63 tensors": (build(n_tensors=1 << 63), "gguf.invalid"),
    "key with a space": (with_key("a b", U32, 1), "gguf.invalid"),
    "unknown value type": (
        build({**VALID, "x": (U32, 1)}).replace(b"\x01\0\0\0\0\0\0\0x\x04", b"\x01\0\0\0\0\0\0\0x\x63"),
        "gguf.invalid",
    ),
    "array of arrays": (with_key("x", ARR, ARR, [(U32, [1])]), "gguf."),
    "alignment 3": (with_key("general.alignment", U32, 3), "gguf.invalid"),
    "alignment 0": (with_key("general.alignment", U32, 0), "gguf.invalid"),
    "alignment as text": (with_key("general.alignment", STR, "32"), "gguf.invalid"),
    "no dimensions": (with_tensor("token_embd.weight", (), 0, 0, 768), "gguf."),
    "zero dimension": (with_tensor("token_embd.weight", (0, 3), 0, 0, 768), "gguf.invalid"),
    "huge dimension": (with_tensor("token_embd.weight", (1 << 62, 3), 0, 0, 768), "gguf.invalid"),
    "removed type": (with_tensor("token_embd.weight", (64, 3), 4, 0, 768), "gguf.unsupported"),
    "partial block": (with_tensor("token_embd.weight", (33, 3), 2, 0, 768), "gguf.invalid"),
    "offset elsewhere": (with_tensor("token_embd.weight", (64, 3), 0, 32, 768), "gguf.invalid"),
    "same name twice": (with_tensor("output_norm.weight", (64, 3), 0, 0, 768), "gguf.invalid"),
    "name of 64 bytes": (with_tensor("x" * 64, (64, 3), 0, 0, 768), "gguf.invalid"),
    "data cut by a byte": (build()[:-1], "gguf.truncated"),
    "data cut away": (build()[:-1024], "gguf.truncated"),
    "bytes behind the data": (build(extra=b"x" * 33), "gguf.invalid"),
    "another architecture": (with_key("general.architecture", STR, "qwen2"), "gguf.unsupported"),
    "no layers": (with_key("llama.block_count", U32, 0), "gguf.invalid"),
    "513 layers": (with_key("llama.block_count", U32, 513), "gguf.invalid"),
    "layers as text": (with_key("llama.block_count", STR, "1"), "gguf.invalid"),
    "context 2^32-1": (with_key("llama.context_length", U32, 2**32 - 1), "gguf.invalid"),
    "3 of 4 heads": (with_key("llama.attention.head_count_kv", U32, 3), "gguf.invalid"),
    "no key/value heads": (with_key("llama.attention.head_count_kv", U32, 0), "gguf.invalid"),
    "odd head width": (with_key("llama.attention.key_length", U32, 15), "gguf.invalid"),
    "rope wider than a head": (with_key("llama.rope.dimension_count", U32, 32), "gguf.invalid"),
    "epsilon NaN": (with_key("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "gguf.invalid"),
    "rope base infinite": (with_key("llama.rope.freq_base", F32, float("inf")), "gguf.invalid"),
    "unknown rope scaling": (with_key("llama.rope.scaling.type", STR, "foo"), "gguf.invalid"),
    "experts used": (with_key("llama.expert_used_count", U32, 2), "gguf.invalid"),
    "expert groups": (with_key("llama.expert_group_count", U32, 2), "gguf.invalid"),
    "prediction layers": (with_key("llama.nextn_predict_layers", U32, 2), "gguf.invalid"),
    "SentencePiece without byte tokens": (with_key("tokenizer.ggml.model", STR, "llama"), "gguf.invalid"),
    "2^63 numbers in an array": (
        build({**VALID, "x": (ARR, U32, [7])}).replace(
            b"x\x09\0\0\0\x04\0\0\0\x01\0\0\0\0\0\0\0", b"x\x09\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\x80"
        ),
        "gguf.truncated",
    ),
    "experts": (with_key("llama.expert_count", U32, 8), "gguf.invalid"),
    "split file": (with_key("split.count", U32, 2), "gguf.invalid"),
    "vocabulary `test`": (with_key("tokenizer.ggml.model", STR, "test"), "gguf.invalid"),
    "no tokens": (with_key("tokenizer.ggml.tokens", ARR, STR, []), "gguf.invalid"),
    "duplicate token": (with_key("tokenizer.ggml.tokens", ARR, STR, ["a", "a", "<s>"]), "gguf.invalid"),
    "duplicate up to NUL": (with_key("tokenizer.ggml.tokens", ARR, STR, ["a", "a\0b", "<s>"]), "gguf.invalid"),
    "types too short": (with_key("tokenizer.ggml.token_type", ARR, I32, [1, 1]), "gguf.invalid"),
    "type 77": (with_key("tokenizer.ggml.token_type", ARR, I32, [1, 1, 77]), "gguf.invalid"),
    "score NaN": (with_key("tokenizer.ggml.scores", ARR, F32, [0.0, 1.0, float("nan")]), "gguf.invalid"),
    "bos outside": (with_key("tokenizer.ggml.bos_token_id", U32, 3), "gguf.invalid"),
    "eos added but unnamed": (with_key("tokenizer.ggml.add_eos_token", BOOL, 1), "gguf.invalid"),
    "template is a number": (with_key("tokenizer.chat_template", U32, 1), "gguf.invalid"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    data, code = BAD[case]
    with pytest.raises(GGUFError) as caught:
        read_header(write(tmp_path, data))
    assert caught.value.code.startswith(code)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "key", [k for k in VALID if k.startswith(("general", "llama")) and "kv" not in k and "rope" not in k]
)
def test_refuses_without(key: str, tmp_path: Path) -> None:
    with pytest.raises(GGUFError):
        read_header(write(tmp_path, build({k: v for k, v in VALID.items() if k != key})))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build()
    for length in range(len(whole)):
        with pytest.raises(GGUFError):
            read_header(write(tmp_path, whole[:length]))


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Whatever is flipped: a header, or one of our errors; never another exception."""
    rng = random.Random(7)
    whole = build()
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole) - 1024)] = rng.randrange(256)
        try:
            read_header(write(tmp_path, bytes(damaged)))
        except EdgeVLMError:
            refused += 1
    assert refused > 1500  # most bytes of a header matter


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        read_header(tmp_path / "absent.gguf")
    assert caught.value.code == "file.not_found"
    with pytest.raises(FileError) as caught:
        read_header(tmp_path)
    assert caught.value.code == "file.not_regular"
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    done: list[str] = []

    def read() -> None:
        try:
            read_header(fifo)
        except FileError as error:
            done.append(error.code)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert done == ["file.not_regular"], "reading a FIFO must not wait for a writer"


#: The reader looks at the file through windows of a megabyte; of these texts 40,000 fill several, and end anywhere.
_WINDOW_BYTES = 1 << 20


def _many_texts() -> list[str]:
    draw = random.Random(5)
    texts = [f"{number} {'é' * draw.randrange(60)}" for number in range(40_000)]
    # a window that ends inside a length, one that ends inside a text, and texts larger than a window
    return [*texts, "a" * (_WINDOW_BYTES + 3), *(f"{number} after" for number in range(5)), "b" * (2 * _WINDOW_BYTES)]


@pytest.mark.parametrize("lead", range(8))
def test_reads_texts_across_windows(lead: int, tmp_path: Path) -> None:
    texts, merges = _many_texts(), [f"x{number} y" for number in range(80_000)]
    data = build({
        "general.name": (STR, "n" * lead), **VALID, "tokenizer.ggml.merges": (ARR, STR, merges),
        "tokenizer.ggml.tokens": (ARR, STR, texts), "tokenizer.ggml.token_type": (ARR, I32, [1] * len(texts)),
        "tokenizer.ggml.unknown_token_id": (U32, 7),
    })  # fmt: skip
    header = read_header(write(tmp_path, data))
    assert header.metadata["tokenizer.ggml.tokens"] == texts
    assert header.metadata["tokenizer.ggml.merges"] is None
    assert header.metadata["tokenizer.ggml.unknown_token_id"] == 7
    start, end = header.places["tokenizer.ggml.merges"]
    assert end - start == 8 + len("tokenizer.ggml.merges") + 4 + 4 + 8 + sum(8 + len(merge) for merge in merges)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_refuses_texts_that_end_beyond_a_window(cut: float, tmp_path: Path) -> None:
    data = build({**VALID, "tokenizer.ggml.merges": (ARR, STR, _many_texts())})
    with pytest.raises(GGUFError) as caught:
        read_header(write(tmp_path, data[: int(cut * len(data))]))
    assert caught.value.code == "gguf.truncated"


@pytest.mark.parametrize("number", [0, 20_000, 39_999])
def test_refuses_a_text_that_is_too_long(number: int, tmp_path: Path) -> None:
    texts = _many_texts()[:40_000]
    data = bytearray(build({**VALID, "tokenizer.ggml.merges": (ARR, STR, texts)}))
    raw = texts[number].encode()
    place = data.index(len(raw).to_bytes(8, "little") + raw)
    data[place : place + 8] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(GGUFError, match="a string of 1099511627776 bytes"):
        read_header(write(tmp_path, bytes(data)))
