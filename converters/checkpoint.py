"""A Hugging Face checkpoint folder: its JSON files, its tokenizer files and its tensors. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgevlm.bundle import sha256_of
from edgevlm.converters import safetensors, torch_pickle
from edgevlm.converters.safetensors import Tensor
from edgevlm.errors import CheckpointError, FileError

_JSON_LIMIT_BYTES = 256 << 20  # tokenizer.json of a large vocabulary has about 20 MB
_TEXT_LIMIT_BYTES = 4 << 20
_BINARY_LIMIT_BYTES = 64 << 20  # tokenizer.model of a large vocabulary has about 4 MB
#: (inode, size, time of change in ns) of a regular file, or None if there is no such file.
FileStatus = tuple[int, int, int] | None
Status = dict[str, FileStatus]
#: Where tensors lie, in order of preference: the single file, the index of several, and their reader.
_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json", safetensors.open_file),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_pickle.open_file),
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: Where it lies.
        config: config.json.
        tensors: Every tensor of every shard, by name.
        files: Names of the files that were used, sorted; `hashes` covers these.
        status: `stat` of each file that was looked for, taken before it was read; None for one that does not exist.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[str, ...]
    status: Status

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder as an object, or None if there is no such file."""
        return read_json(self.folder, name)

    def text(self, name: str) -> str | None:
        """A text file of the folder, or None if there is no such file."""
        raw = _read(self.folder, name, _TEXT_LIMIT_BYTES)
        try:
            return None if raw is None else raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.folder / name} is not UTF-8 text ({error.reason} at byte {error.start})",
                code="checkpoint.invalid",
            ) from error

    def binary(self, name: str) -> bytes | None:
        """The bytes of a small file of the folder, or None if there is no such file."""
        return _read(self.folder, name, _BINARY_LIMIT_BYTES)

    def image_processor(self, *, optional: bool = False) -> dict[str, Any]:
        """The image processor's settings, in either of transformers' places; empty if there need be none."""
        plain = self.json("preprocessor_config.json")
        joint = self.json("processor_config.json") or {}
        found = plain if plain is not None else joint.get("image_processor")
        if found is None and optional:
            return {}
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{self.folder} has neither preprocessor_config.json nor processor_config.json with an "
                "image_processor; download the missing file",
                code="checkpoint.invalid",
            )
        return found

    def hashes(self) -> dict[str, str]:
        """sha256 of every file that influences the result, by name."""
        return {name: sha256_of(self.folder / name) for name in self.files}


#: Files beside the tensors that influence the result.
SIDE_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
    "README.md",
)  # fmt: skip


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder and check all headers.

    Raises:
        FileError: `file.not_found` or `file.not_regular`.
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported` (for pickle).
    """
    if not folder.exists():
        raise FileError(f"the checkpoint {folder} does not exist", code="file.not_found")
    if not folder.is_dir():
        raise FileError(f"the checkpoint {folder} is a file; name the folder that holds config.json",
                        code="file.not_regular")  # fmt: skip
    whole = [name for single, index, _ in _FORMATS for name in (single, index)]
    status = {name: status_of(folder / name) for name in (*SIDE_FILES, *whole)}
    for name in status:
        locate(folder, name)
    config = read_json(folder, "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; it is not a checkpoint", code="checkpoint.invalid")
    single, index_name, read = next((form for form in _FORMATS if status[form[0]] or status[form[1]]), _FORMATS[0])
    index = read_json(folder, index_name)
    if index is None and status[single] is None:
        _refuse_missing(folder)
    shards = [single] if index is None else _shards(folder, index, index_name)
    status |= {shard: status_of(folder / shard) for shard in shards}
    shown = {shard: read(folder / shard) for shard in shards}
    tensors = _join_shards(shown, index_name, None if index is None else index["weight_map"])
    ours = {*SIDE_FILES, index_name, *shards}
    used = sorted(name for name, found in status.items() if found is not None and name in ours)
    return Checkpoint(folder, config, tensors, tuple(used), status)


def _join_shards(
    shards: dict[str, dict[str, Tensor]], index_name: str, weight_map: dict[str, str] | None
) -> dict[str, Tensor]:
    """Tensors of all shards by name; each lies where the index says."""
    tensors: dict[str, Tensor] = {}
    for shard, found in shards.items():
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"the tensor {name} lies in two shards", code="checkpoint.invalid")
            if weight_map is not None and weight_map.get(name) != shard:
                raise CheckpointError(f"{index_name} does not say that {name} lies in {shard}",
                                      code="checkpoint.invalid")  # fmt: skip
            tensors[name] = tensor
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise CheckpointError(f"{index_name} names the tensor {missing[0]}, no shard has it",
                              code="checkpoint.missing_tensor")  # fmt: skip
    return tensors


def locate(folder: Path, name: str) -> Path | None:
    """The path of a file of the checkpoint, or None if there is no such file.

    A link may stay in the folder or lead to the blobs of a Hugging Face cache, `snapshots/REVISION/` beside `blobs/`.
    Any other could carry a file of this machine into a bundle that is given away.

    Raises:
        CheckpointError: `checkpoint.unsupported`, for a link that leads elsewhere.
    """
    path = folder / name
    if not path.is_file():
        return None
    home, real = folder.resolve(), path.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, cache):
        raise CheckpointError(
            f"{path} is a link out of the checkpoint; copy the file itself into the folder",
            code="checkpoint.unsupported",
        )
    return path


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON object, or None if the file is absent. Keys that appear twice are errors.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    raw = _read(folder, name, _JSON_LIMIT_BYTES)
    if raw is None:
        return None
    try:
        data = json.loads(raw, object_pairs_hook=unique)
        if not isinstance(data, dict):
            raise ValueError(f"an object is needed, found {type(data).__name__}")
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}", code="checkpoint.invalid") from error
    return data


def _read(folder: Path, name: str, limit: int) -> bytes | None:
    """The bytes of a file of the checkpoint, or None if there is no such file."""
    path = locate(folder, name)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="file.unreadable") from error
    if len(raw) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB", code="checkpoint.invalid")
    return raw


def _shards(folder: Path, index: dict[str, Any], index_name: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder}: {index_name} has no weight_map", code="checkpoint.invalid")
    shards = sorted(set(weight_map.values()))
    suffix = index_name.removesuffix(".index.json").rpartition(".")[2]
    for shard in shards:
        # A plain name, so that an index cannot point outside the folder.
        if not re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.{suffix}", shard):
            raise CheckpointError(f"{index_name} names the odd file {shard!r}", code="checkpoint.invalid")
        if locate(folder, shard) is None:
            raise CheckpointError(f"{folder / shard} is missing although the index names it; download it",
                                  code="checkpoint.invalid")  # fmt: skip
    return shards


def _refuse_missing(folder: Path) -> NoReturn:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{folder} has its weights in pickle files of its own kind; only pytorch_model.bin is read, and nothing in "
            "it is run; save the model as safetensors (`save_pretrained`) on a machine that trusts it",
            code="checkpoint.unsupported",
        )
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin", code="checkpoint.invalid")


def unchanged(checkpoint: Checkpoint) -> bool:
    """Whether every file is still the one that was opened, and none has appeared."""
    return {name: status_of(checkpoint.folder / name) for name in checkpoint.status} == checkpoint.status


def status_of(path: Path) -> FileStatus:
    """What tells a file from a changed one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
