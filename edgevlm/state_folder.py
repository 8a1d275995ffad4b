"""Where edgevlm may keep what it found out: tuned thread counts and caches, all of which can be thrown away.

Nothing in there is needed for an answer. Whoever reads from it doubts what is read; whoever cannot write to it warns
once and goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgevlm.storage import storage_errors


def state_folder() -> Path | None:
    """The folder for state: `$EDGEVLM_STATE`, else `edgevlm` in `$XDG_STATE_HOME`, else in `~/.local/state`.

    It need not exist; see `make_private`. None if `EDGEVLM_STATE` is set but empty (nothing is to be kept), or if this
    user has no home.
    """
    given = os.environ.get("EDGEVLM_STATE")
    if given is not None:
        return Path(given).absolute() if given else None
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):  # the XDG specification says to ignore a relative one
        return Path(state) / "edgevlm"
    home = os.path.expanduser("~")
    return Path(home) / ".local" / "state" / "edgevlm" if os.path.isabs(home) else None


def make_private(folder: Path) -> None:
    """Make a folder with its parents, for this user alone: what is kept tells which pictures were asked about.

    Raises:
        StorageError: the system refused.
    """
    with storage_errors(folder):
        for parent in reversed(folder.parents):
            if not parent.exists():
                parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
