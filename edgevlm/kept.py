"""What a model keeps on disk from one process to the next: embeddings of pictures, and the decoder's state behind them.

All of it can be recomputed. Whatever cannot be read, is not whole or belongs to something else is as if it were not
there; what cannot be written is a warning, never a failure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.blob import Shelf
from edgevlm.errors import StorageError
from edgevlm.splice import Position
from edgevlm.storage import free_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The most that is kept, if so much is free: 500 pictures' states of a 1B model take 10 GB, of embeddings 2 GB.
_LIMIT_BYTES = 1 << 30
#: Never more than this part of what is free.
_FREE_PART = 8


class Kept:
    """The cache on disk of one folder; several processes may share it.

    Args:
        folder: Made when something is written.
        limit_bytes: Most bytes; None takes a gigabyte, or an eighth of what is free if that is less.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int | None = None) -> None:
        path = Path(os.path.expanduser(folder))
        self.shelf = Shelf(path / "kept", _default_limit(path) if limit_bytes is None else limit_bytes)
        #: What went wrong since the last `take_warnings`.
        self._warnings: list[str] = []

    def take_warnings(self) -> tuple[str, ...]:
        """What could not be kept since the last call, in words."""
        taken, self._warnings = tuple(self._warnings), []
        return taken

    def embeds(self, key: str, identity: str, shape: tuple[int, int]) -> NDArray[np.float32] | None:
        """Embeddings of this shape, read-only, or None."""
        import numpy as np

        found = self.shelf.get(f"{key}.embeds", {"kind": "embeds", "identity": identity, "shape": list(shape)})
        if found is None or len(found[1]) != shape[0] * shape[1] * 4:
            return None
        rows_ND = np.frombuffer(found[1], dtype="<f4").reshape(shape)
        # llama.cpp does not check rows, and somebody else may have written the file.
        return rows_ND if np.isfinite(rows_ND).all() else None

    def put_embeds(self, key: str, identity: str, rows_ND: NDArray[np.float32]) -> None:
        import numpy as np

        header = {"kind": "embeds", "identity": identity, "shape": list(rows_ND.shape)}
        self._put(f"{key}.embeds", header, np.ascontiguousarray(rows_ND, dtype="<f4").tobytes())

    def state(self, identity: dict[str, Any], held: Sequence[Position]) -> memoryview | None:
        """The decoder's state after exactly these positions, or None."""
        found = self.shelf.get(_state_name(identity, held), _state_header(identity, held))
        return found[1] if found else None

    def put_state(self, identity: dict[str, Any], held: Sequence[Position], state: memoryview) -> None:
        name = _state_name(identity, held)
        if not os.path.exists(self.shelf.folder / name):
            self._put(name, _state_header(identity, held), state)

    def _put(self, name: str, header: dict[str, Any], payload: bytes | memoryview) -> None:
        try:
            self.shelf.put(name, header, payload)
        except (StorageError, OSError, ValueError) as error:  # ValueError: a NUL in the folder's name
            self._warnings.append(f"nothing is kept for the next time: {error}")


def _state_header(identity: dict[str, Any], held: Sequence[Position]) -> dict[str, Any]:
    """The positions only as a digest: a system message is among them, and nobody has to read it from a cache."""
    return {"kind": "state", "identity": identity, "positions": len(held), "held": _digest(list(held))}


def _state_name(identity: dict[str, Any], held: Sequence[Position]) -> str:
    return f"{_digest([identity, list(held)])}.state"


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _default_limit(folder: Path) -> int:
    try:
        return min(_LIMIT_BYTES, free_bytes(folder) // _FREE_PART)
    except (OSError, ValueError):
        return _LIMIT_BYTES
