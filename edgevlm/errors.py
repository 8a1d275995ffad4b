"""Every error that edgevlm raises on purpose, in one tree.

    EdgeVLMError
    ├── UsageError                    the call itself is wrong
    ├── SchemaError                   a JSON schema is not one, or asks for what we cannot compile
    ├── FileError                     a path is missing, unreadable or not a regular file
    ├── StorageError                  the disk refused (full, read-only, failed fsync)
    ├── ImageError                    a picture cannot be used
    ├── BundleError                   a bundle is incomplete, damaged or made by another version
    ├── GGUFError                     a GGUF file breaks the format or asks for what we cannot run
    ├── CheckpointError               a checkpoint cannot be converted
    ├── ImatrixError                  an importance matrix cannot be used for this model
    ├── FidelityError                 a conversion would cost more than allowed
    ├── CapabilityError               the model cannot do what was asked
    ├── ContextError                  the prompt does not fit into the context
    ├── MemoryPlanError               the model does not fit into memory
    ├── KernelError                   an unknown or unusable SIMD target
    ├── DependencyError               an optional or native package is missing, too old or broken
    └── BackendError                  llama.cpp or ONNX Runtime failed

Each error carries a stable `code` ("image.undecodable"), the process `exit_code` of the command line and the
`http_status` of the server; both front ends render the same sentence. A message says what was asked, what was found
and what to do. Codes are registered in `CODES`: raising an unregistered one is our own bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

#: Every code that may be raised, with the sentence that documents it.
CODES: dict[str, str] = {
    "usage.invalid": "an argument is outside its range or contradicts another",
    "schema.invalid": "the schema is not a JSON schema, or nothing satisfies it",
    "schema.unsupported": "the schema uses a keyword that is not understood, or is too large",
    "file.not_found": "the path does not exist",
    "file.not_regular": "the path is a folder, a pipe or a device where a file is needed",
    "file.unreadable": "the operating system refused to read the file",
    "storage.full": "no space is left on the device",
    "storage.failed": "the operating system refused to write",
    "storage.exists": "the output exists and is not ours to replace",
    "image.undecodable": "the bytes are not a picture that can be decoded",
    "image.format": "the picture's format is not accepted",
    "image.truncated": "the picture ends before its data is complete",
    "image.too_many_pixels": "the picture is larger than the limit",
    "image.too_many_bytes": "the encoded picture is larger than the limit",
    "image.aspect": "the picture is too long and thin",
    "image.array": "an array or object is not a uint8 picture",
    "bundle.invalid": "bundle.json cannot be understood",
    "bundle.version": "bundle.json was written by another version of edgevlm",
    "bundle.missing_file": "a file named by bundle.json is absent",
    "bundle.hash_mismatch": "a file differs from what bundle.json recorded",
    "gguf.invalid": "the file breaks the GGUF format",
    "gguf.truncated": "the file is shorter than its header says",
    "gguf.unsupported": "the file asks for something that this version cannot run",
    "checkpoint.invalid": "a checkpoint file cannot be understood",
    "checkpoint.missing_tensor": "a tensor that the model needs is absent",
    "checkpoint.unexpected_tensor": "the checkpoint has a tensor that the model does not use",
    "checkpoint.shape": "a tensor's shape contradicts config.json",
    "checkpoint.unsupported": "no family can read this checkpoint",
    "checkpoint.overflow": "a weight does not fit into the requested type",
    "imatrix.invalid": "the file is not an importance matrix, or is damaged",
    "imatrix.mismatch": "the importance matrix belongs to another model",
    "fidelity.exceeded": "the converted model differs too much from its checkpoint",
    "capability.no_vision": "a picture was given to a text-only model",
    "capability.no_tools": "the model's chat template has no place for tools",
    "capability.no_template": "the model carries no chat template that can be used",
    "context.too_small": "the prompt needs more positions than the context has",
    "memory.too_small": "the model needs more memory than there is, or than it was allowed",
    "kernels.unknown_target": "no SIMD target has that name",
    "kernels.unsupported_target": "this CPU cannot run that SIMD target",
    "dependency.missing": "a package is not installed",
    "dependency.version": "a package has a version that is known not to work",
    "backend.load": "llama.cpp or ONNX Runtime could not load the model",
    "backend.failed": "llama.cpp or ONNX Runtime failed while running the model",
}


class EdgeVLMError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One sentence: what was asked, what was found, what to do. No full stop after a single sentence.
        code: A key of `CODES`.
    """

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, code: str) -> None:
        assert code in CODES, f"unregistered error code {code!r}"
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # The keyword-only code would be lost on the way between processes.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[EdgeVLMError], args: tuple[Any, ...], state: dict[str, Any]) -> EdgeVLMError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class UsageError(EdgeVLMError):
    """The call itself is wrong."""

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, *, code: str = "usage.invalid") -> None:
        super().__init__(message, code=code)


class SchemaError(EdgeVLMError):
    """A JSON schema is not one, or asks for what we cannot compile.

    Args:
        pointer: Where in the schema, as a JSON pointer (RFC 6901).
    """

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, *, code: str, pointer: str) -> None:
        super().__init__(message, code=code)
        self.pointer = pointer


class FileError(EdgeVLMError):
    """A path is missing, unreadable or not a regular file."""

    http_status = 404


class StorageError(EdgeVLMError):
    """The disk refused: full, read-only, or a failed flush."""

    http_status = 507


class ImageError(EdgeVLMError):
    """A picture cannot be used."""

    http_status = 400


class BundleError(EdgeVLMError):
    """A bundle is incomplete, damaged or made by another version."""


class GGUFError(EdgeVLMError):
    """A GGUF file breaks the format or asks for what we cannot run."""


class CheckpointError(EdgeVLMError):
    """A checkpoint cannot be converted."""


class ImatrixError(EdgeVLMError):
    """An importance matrix cannot be used for this model."""


class FidelityError(EdgeVLMError):
    """A conversion would cost more than allowed."""


class CapabilityError(EdgeVLMError):
    """The model cannot do what was asked."""

    http_status = 400


class ContextError(EdgeVLMError):
    """The prompt does not fit into the context.

    Args:
        needed: Positions that prompt and picture take.
        available: Positions that the context has.
    """

    http_status = 400

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message, code="context.too_small")
        self.needed = needed
        self.available = available


class MemoryPlanError(EdgeVLMError):
    """The model does not fit into memory.

    Args:
        needed: Bytes that it takes at least.
        available: Bytes that there are, or that it was allowed.
    """

    http_status = 507

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message, code="memory.too_small")
        self.needed = needed
        self.available = available


class KernelError(EdgeVLMError):
    """An unknown or unusable SIMD target."""

    exit_code = 2
    http_status = 400


class DependencyError(EdgeVLMError):
    """An optional or native package is missing, too old or broken."""


class BackendError(EdgeVLMError):
    """llama.cpp or ONNX Runtime failed."""


class Cancelled(Exception):
    """The caller does not want the rest of an answer; it never leaves edgevlm."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: Import name, for example `"onnx_ir"`.
        extra: The extra of edgevlm that brings it, for example `"convert"`.

    Raises:
        DependencyError: `dependency.missing`, with the install command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"this needs the package `{module}`, which is not usable here ({error}); "
            f"install it with `pip install 'edgevlm[{extra}]'`",
            code="dependency.missing",
        ) from error
