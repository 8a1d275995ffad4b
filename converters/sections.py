"""One section of a JSON file of a checkpoint, read strictly: unknown keys, missing keys and odd values are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

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
LARGEST_NUMBER = 1e30
Choice = TypeVar("Choice")


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

    def reads(self, key: str) -> bool:
        """Whether the key is one that is read here at all."""
        return key in self._defaults

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
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise invalid(f"{self.where}.{key} is {value!r}, a positive number is needed")
        return float(value)

    def activation(self, key: str) -> Activation:
        """A key of `_ACTIVATIONS`."""
        return self.choice(key, _ACTIVATIONS)

    def flag(self, key: str) -> bool:
        """True or false; null means the default."""
        value = self.get(key)
        value = self.default(key) if value is None else value
        if type(value) is not bool:
            raise invalid(f"{self.where}.{key} is {value!r}, true or false is needed")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; null means an empty one."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise invalid(f"{self.where}.{key} is {str(value)[:80]!r}, an object is needed")
        return value or {}

    def choice(self, key: str, options: Mapping[Any, Choice]) -> Choice:
        """What one of the listed values stands for."""
        value = self.get(key)
        # by type as well, because True == 1
        if (type(value), value) not in [(type(option), option) for option in options]:
            raise unsupported(f"{self.where}.{key} is {value!r}, supported are {', '.join(map(str, options))}")
        return options[value]

    def token_id(self, key: str) -> int | None:
        """A token id; of a list of alternatives the first."""
        value = self.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value == -1:  # Llama 1's and 2's way to say that there is none
            return None
        if value is not None and (type(value) is not int or not 0 <= value <= _LARGEST_SIZE):
            raise invalid(f"{self.where}.{key} is {str(value)[:80]!r}, a token id is needed")
        return value


def invalid(what: str) -> CheckpointError:
    """The error for a checkpoint that contradicts itself."""
    return CheckpointError(f"{what}; the checkpoint is incomplete or damaged", code="checkpoint.invalid")


def unsupported(what: str) -> CheckpointError:
    """The error for a checkpoint that is sound but asks for something that we do not have."""
    return CheckpointError(what, code="checkpoint.unsupported")
