"""Where state is kept, and who may read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edgevlm.errors import StorageError
from edgevlm.state_folder import make_private, state_folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"EDGEVLM_STATE": "/mine", "XDG_STATE_HOME": "/xdg", "HOME": "/home/me"}, "/mine"),
        ({"XDG_STATE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/edgevlm"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.local/state/edgevlm"),
        ({"XDG_STATE_HOME": "", "HOME": "/home/me"}, "/home/me/.local/state/edgevlm"),
        ({"EDGEVLM_STATE": "", "HOME": "/home/me"}, None),
        ({"HOME": "nowhere"}, None),
    ],
)
def test_where_state_is_kept(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("EDGEVLM_STATE", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert state_folder() == (None if expected is None else Path(expected))


def test_a_relative_state_folder_stays_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEVLM_STATE", "state")
    assert state_folder() == tmp_path / "state"


def test_what_is_made_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    previous = os.umask(0)
    try:
        make_private(folder)
        make_private(folder)
    finally:
        os.umask(previous)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder)] == [0o700, 0o700]


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        make_private(tmp_path / "a" / "b")
    with pytest.raises(StorageError, match="cannot write"):
        make_private(tmp_path / "a")
