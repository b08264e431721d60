"""The user's key: made once, private, and never used when others could have had it."""

import os
import threading
from pathlib import Path

import pytest

from grood_edge.errors import BackendError
from grood_edge.runtime.user_key import key_path, signature, user_key


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def test_is_made_once_and_private(home: Path) -> None:
    assert user_key(create=False) is None
    assert not key_path().exists()
    key = user_key(create=True)
    assert key is not None
    assert len(key) == 32
    assert user_key(create=True) == user_key(create=False) == key
    assert key_path() == home / "grood-edge" / "engine.key"
    assert key_path().stat().st_mode & 0o777 == 0o600
    assert key_path().parent.stat().st_mode & 0o777 == 0o700
    assert list(key_path().parent.iterdir()) == [key_path()]


def test_is_private_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        user_key(create=True)
    finally:
        os.umask(before)
    assert key_path().stat().st_mode & 0o777 == 0o600


def test_the_first_of_many_wins() -> None:
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(user_key(create=True))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 16
    assert set(keys) == {user_key(create=False)}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602])
def test_one_that_others_could_read_or_write_is_refused(mode: int) -> None:
    user_key(create=True)
    key_path().chmod(mode)
    for create in (True, False):
        with pytest.raises(BackendError, match=f"has mode {mode:04o}.*expected 0600. Delete it"):
            user_key(create)


def test_one_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user_key(create=True)
    owner = key_path().stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(BackendError, match=f"belongs to another user \\(uid {owner}\\)"):
        user_key(create=False)


def test_links_pipes_folders_and_damage_are_refused(tmp_path: Path) -> None:
    key_path().parent.mkdir()
    (tmp_path / "other").write_bytes(bytes(32))
    (tmp_path / "other").chmod(0o600)
    key_path().symlink_to(tmp_path / "other")
    with pytest.raises(BackendError, match="cannot be used"):
        user_key(create=True)
    key_path().unlink()
    os.mkfifo(key_path(), 0o600)
    with pytest.raises(BackendError, match="no regular file"):
        user_key(create=True)
    key_path().unlink()
    for content in (b"", bytes(31), bytes(33)):
        key_path().write_bytes(content)
        key_path().chmod(0o600)
        with pytest.raises(BackendError, match="has not 32 bytes"):
            user_key(create=True)
        key_path().unlink()


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="set XDG_DATA_HOME"):
        user_key(create=True)


def test_without_xdg_data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert key_path() == tmp_path / ".local" / "share" / "grood-edge" / "engine.key"


def test_signatures_depend_on_every_bit() -> None:
    key = bytes(32)
    assert signature(b"document", key) == signature(b"document", key)
    assert (
        len({signature(b"document", key), signature(b"documenu", key), signature(b"document", bytes(31) + b"\1")}) == 3
    )
    # RFC 4231, test case 2
    assert signature(b"what do ya want for nothing?", b"Jefe").startswith("5bdcc146bf60754e6a042426089575c75a003f08")
