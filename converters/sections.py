"""One section of a JSON file of a checkpoint, read strictly: unknown keys, missing keys and odd values are errors."""

from __future__ import annotations

import math
from typing import Any

from edgevlm.errors import CheckpointError
from edgevlm.families.schema import REQUIRED, Keys
from edgevlm.spec import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LARGEST_SIZE = 1 << 24


class Section:
    """One section of a JSON file, read under the rules of `Keys`."""

    def __init__(self, where: str, data: Any, *keys: Keys) -> None:
        if not isinstance(data, dict):
            raise invalid(f"{where} must be an object, found {type(data).__name__}")
        self.where, self._data = where, data
        self._defaults = {name: default for key in keys for name, default in key.read.items()}
        fixed = {name: values for key in keys for name, values in key.fixed.items()}
        ignored = {name for key in keys for name in key.ignored}
        unknown = sorted(set(data) - set(self._defaults) - set(fixed) - ignored)
        if unknown:
            raise unsupported(
                f"{where} has the unknown key {', '.join(unknown)}, which may change what the model computes"
            )
        for name, values in fixed.items():
            found = data.get(name, values[0])
            if repr(found) not in map(repr, values):  # by text, because True == 1
                raise unsupported(f"{where}.{name} is {found!r}, only {' or '.join(map(repr, values))} can be run")

    def get(self, key: str) -> Any:
        """The value as it stands, or its default."""
        value = self._data.get(key, self._defaults[key])
        if value is REQUIRED:
            raise invalid(f"{self.where} lacks {key}")
        return value

    def default(self, key: str) -> Any:
        """What the Hugging Face class uses when the key is absent."""
        return self._defaults[key]

    def size(self, key: str, limit: int = _LARGEST_SIZE) -> int:
        """A positive whole number."""
        value = self.get(key)
        if type(value) is not int or not 1 <= value <= limit:
            raise invalid(f"{self.where}.{key} is {value!r}, a whole number from 1 to {limit} is needed")
        return value

    def number(self, key: str) -> float:
        """A positive finite number."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise invalid(f"{self.where}.{key} is {value!r}, a positive number is needed")
        return float(value)

    def activation(self, key: str) -> Activation:
        value = self.get(key)
        if value not in _ACTIVATIONS:
            raise unsupported(f"{self.where}.{key} is {value!r}, supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def token_id(self, key: str) -> int | None:
        """A token id; of a list of alternatives the first."""
        value = self.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (type(value) is not int or value < 0):
            raise invalid(f"{self.where}.{key} is {value!r}, a token id is needed")
        return value


def invalid(what: str) -> CheckpointError:
    """The error for a checkpoint that contradicts itself."""
    return CheckpointError(f"{what}; the checkpoint is incomplete or damaged", code="checkpoint.invalid")


def unsupported(what: str) -> CheckpointError:
    """The error for a checkpoint that is sound but asks for something that we do not have."""
    return CheckpointError(what, code="checkpoint.unsupported")
