"""A Hugging Face checkpoint folder: its JSON files, its tokenizer files and its tensors. Nothing in it is executed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.bundle import sha256_of
from edgevlm.converters import safetensors
from edgevlm.converters.safetensors import Tensor
from edgevlm.errors import CheckpointError, FileError

_JSON_LIMIT_BYTES = 256 << 20  # tokenizer.json of a large vocabulary has about 20 MB
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: Where it lies.
        config: config.json.
        tensors: Every tensor of every shard, by name.
        files: Names of the files that were used, sorted; `hashes` covers these.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[str, ...]

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder as an object, or None if there is no such file."""
        return read_json(self.folder / name)

    def text(self, name: str) -> str | None:
        """A text file of the folder, or None if there is no such file."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def image_processor(self) -> dict[str, Any]:
        """The image processor's settings, in either of transformers' two places."""
        plain = self.json("preprocessor_config.json")
        joint = self.json("processor_config.json") or {}
        found = plain if plain is not None else joint.get("image_processor")
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
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "README.md",
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
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; it is not a checkpoint", code="checkpoint.invalid")
    index = read_json(folder / "model.safetensors.index.json")
    shards = ["model.safetensors"] if index is None else _shards(folder, index)
    if index is None and not (folder / "model.safetensors").is_file():
        _refuse_missing(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in safetensors.open_file(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"the tensor {name} lies in two shards", code="checkpoint.invalid")
            if index is not None and index["weight_map"].get(name) != shard:
                raise CheckpointError(f"model.safetensors.index.json does not say that {name} lies in {shard}",
                                      code="checkpoint.invalid")  # fmt: skip
            tensors[name] = tensor
    missing = [] if index is None else sorted(set(index["weight_map"]) - set(tensors))
    if missing:
        raise CheckpointError(f"model.safetensors.index.json names the tensor {missing[0]}, no shard has it",
                              code="checkpoint.missing_tensor")  # fmt: skip
    used = [name for name in SIDE_FILES if (folder / name).is_file()]
    used += shards + ([] if index is None else ["model.safetensors.index.json"])
    return Checkpoint(folder, config, tensors, tuple(sorted(used)))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or None if the file is absent. Keys that appear twice are errors.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise ValueError(f"it is larger than {_JSON_LIMIT_BYTES >> 20} MiB")
        data = json.loads(path.read_bytes(), object_pairs_hook=unique)
        if not isinstance(data, dict):
            raise ValueError(f"an object is needed, found {type(data).__name__}")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="file.unreadable") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", code="checkpoint.invalid") from error
    return data


def _shards(folder: Path, index: dict[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder}: model.safetensors.index.json has no weight_map", code="checkpoint.invalid")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # A plain name, so that an index cannot point outside the folder.
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", shard):
            raise CheckpointError(f"model.safetensors.index.json names the odd file {shard!r}",
                                  code="checkpoint.invalid")  # fmt: skip
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing although the index names it; download it",
                                  code="checkpoint.invalid")  # fmt: skip
    return shards


def _refuse_missing(folder: Path) -> None:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{folder} has its weights in pickle files, which run code when they are opened and are never read; "
            "save the model as safetensors (`save_pretrained`) on a machine that trusts it",
            code="checkpoint.unsupported",
        )
    raise CheckpointError(f"{folder} has no model.safetensors", code="checkpoint.invalid")


def stat_all(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """(inode, size, time of change in ns) of every used file: equal before and after means that nobody replaced one."""
    found = {name: os.stat(checkpoint.folder / name) for name in checkpoint.files}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def finite(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The tensor as float32, refusing NaN and infinity.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    values = safetensors.widen(tensor)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{tensor.name} holds NaN or infinity; the checkpoint is damaged", code="checkpoint.invalid"
        )
    return values
