"""All or nothing: what is on disk after a result was published, refused, or interrupted."""

import contextlib
import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from grood_edge.errors import OutputError, VerificationError
from grood_edge.publishing import check_output, publish


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root within the block, for which every folder is writable; real and effective user, as access() asks."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.setresuid(65534, 65534, 0)
    except OSError as error:
        pytest.skip(f"root cannot change its user here: {error}")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


class TestPublish:
    def test_new_file(self, tmp_path: Path) -> None:
        publish(b"content", tmp_path / "a.onnx", force=False)
        assert (tmp_path / "a.onnx").read_bytes() == b"content"
        assert os.listdir(tmp_path) == ["a.onnx"]

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            publish(b"content", tmp_path / "a.onnx", force=False)
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "a.onnx").stat().st_mode) == 0o640

    def test_existing_is_untouched_without_force(self, tmp_path: Path) -> None:
        path = tmp_path / "a.onnx"
        path.write_bytes(b"old")
        before = path.stat()
        with pytest.raises(OutputError, match="exists and was left as it is; use --force"):
            publish(b"new", path, force=False)
        assert path.read_bytes() == b"old"
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert os.listdir(tmp_path) == ["a.onnx"]

    def test_existing_is_replaced_with_force(self, tmp_path: Path) -> None:
        path = tmp_path / "a.onnx"
        path.write_bytes(b"old")
        with path.open("rb") as reader:
            publish(b"new", path, force=True)
            assert reader.read() == b"old"  # who has it open keeps a whole file
        assert path.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["a.onnx"]

    def test_a_file_that_appears_meanwhile_is_untouched(self, tmp_path: Path) -> None:
        path = tmp_path / "a.onnx"
        with pytest.raises(OutputError, match="File exists; nothing was changed"):
            publish(b"new", path, force=False, check=lambda _: write(path, b"theirs"))
        assert path.read_bytes() == b"theirs"
        assert os.listdir(tmp_path) == ["a.onnx"]

    @pytest.mark.parametrize("existing", [True, False])
    def test_disk_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
        path = tmp_path / "a.onnx"
        if existing:
            path.write_bytes(b"old")

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=f"cannot write {path}: the disk is full; nothing was changed"):
            publish(b"new", path, force=True)
        assert os.listdir(tmp_path) == (["a.onnx"] if existing else [])
        if existing:
            assert path.read_bytes() == b"old"

    @pytest.mark.parametrize("existing", [True, False])
    def test_write_that_fails_half_way(self, tmp_path: Path, existing: bool) -> None:
        """A real fault: the kernel takes the first 64 KB and refuses the rest."""
        path = tmp_path / "a.onnx"
        if existing:
            path.write_bytes(b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        try:
            with pytest.raises(OutputError, match=f"cannot write {path}: File too large; nothing was changed"):
                publish(b"new" * 100_000, path, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == (["a.onnx"] if existing else [])
        if existing:
            assert path.read_bytes() == b"old"

    def test_device_is_not_replaced_by_a_file(self) -> None:
        with pytest.raises(OutputError, match="device or pipe"):
            publish(b"new", Path("/dev/full"), force=True)
        assert stat.S_ISCHR(os.stat("/dev/full").st_mode)

    @pytest.mark.parametrize("existing", [True, False])
    def test_interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
        path = tmp_path / "a.onnx"
        if existing:
            path.write_bytes(b"old")
        seen: list[list[str]] = []

        def interrupt(*args: object) -> None:
            seen.append(os.listdir(tmp_path))
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(b"new", path, force=True)
        assert len(seen[0]) == 1 + existing  # the fault came while the temporary file was there
        assert os.listdir(tmp_path) == (["a.onnx"] if existing else [])
        if existing:
            assert path.read_bytes() == b"old"

    @pytest.mark.parametrize("error", [VerificationError("wrong"), KeyboardInterrupt(), RuntimeError("bug")])
    def test_check_that_fails(self, tmp_path: Path, error: BaseException) -> None:
        def check(path: Path) -> None:
            assert path.read_bytes() == b"new"
            assert path != tmp_path / "a.onnx"
            raise error

        with pytest.raises(type(error)):
            publish(b"new", tmp_path / "a.onnx", force=False, check=check)
        assert os.listdir(tmp_path) == []

    def test_check_sees_the_whole_file_before_it_has_its_name(self, tmp_path: Path) -> None:
        seen: list[tuple[bytes, bool]] = []
        path = tmp_path / "a.onnx"
        publish(b"new", path, False, check=lambda p: seen.append((p.read_bytes(), path.exists())))
        assert seen == [(b"new", False)]

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_file_system_without_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        def link(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)
        publish(b"new", tmp_path / "a.onnx", force=False)
        assert (tmp_path / "a.onnx").read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["a.onnx"]
        with pytest.raises(OutputError, match="nothing was changed"):
            publish(b"x", tmp_path / "b.onnx", False, check=lambda _: write(tmp_path / "b.onnx", b"b"))
        assert (tmp_path / "b.onnx").read_bytes() == b"b"

    def test_folder_as_path(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="is a folder; expected the path of a file"):
            publish(b"new", tmp_path, force=True)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="does not exist; create it first"):
            publish(b"new", tmp_path / "none" / "a.onnx", force=False)
        assert os.listdir(tmp_path) == []

    def test_a_file_as_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError):
            publish(b"new", tmp_path / "file" / "a.onnx", force=True)

    def test_folder_that_is_not_writable(self, open_folder: Path) -> None:
        open_folder.chmod(0o555)
        with unprivileged(), pytest.raises(OutputError, match=f"the folder {open_folder} is not writable"):
            check_output(open_folder / "a.onnx", force=False)
        with unprivileged(), pytest.raises(OutputError, match="not writable; choose another"):
            publish(b"new", open_folder / "a.onnx", force=True)
        assert os.listdir(open_folder) == []

    def test_folder_that_must_not_be_entered(self, open_folder: Path) -> None:
        inner = open_folder / "closed"
        inner.mkdir()
        inner.chmod(0)
        with unprivileged(), pytest.raises(OutputError, match=r"Permission denied|not writable|does not exist"):
            check_output(inner / "deep" / "a.onnx", force=False)
        inner.chmod(0o755)

    def test_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="File name too long"):
            publish(b"new", tmp_path / ("a" * 300), force=False)
        assert os.listdir(tmp_path) == []

    def test_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "a.onnx").write_bytes(b"old")
        (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "a.onnx")
        publish(b"new", tmp_path / "link.onnx", force=True)
        assert (tmp_path / "link.onnx").is_symlink()
        assert (tmp_path / "real" / "a.onnx").read_bytes() == b"new"

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        publish(b"new", Path("a.onnx"), force=False)
        assert os.listdir(tmp_path) == ["a.onnx"]
