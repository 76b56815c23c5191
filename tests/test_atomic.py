"""Files and directories that appear whole or not at all, replace nothing but their like, and leave nothing behind."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from phi3_mlx.errors import AdapterError, CheckpointError
from phi3_mlx.store import atomic

# Writes with one of the module's functions, and is killed with half of it on the disk.
KILLED = """
import os, signal, sys
from pathlib import Path
from phi3_mlx.store import atomic

kind, place = sys.argv[1], Path(sys.argv[2])
if kind == "new_file":
    with atomic.new_file(place) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
options = {"last": "a"} if kind == "new_files" else {}
with getattr(atomic, kind)(place, **options) as folder:
    (folder / "a").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(kind: str, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kind, place], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    atomic.replace_file(tmp_path / "file", b"first")

    def break_off():
        with atomic.new_file(tmp_path / "file") as file:
            file.write(b"sec")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        break_off()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"
    atomic.replace_file(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"second"


def test_a_file_takes_its_place_by_a_rename(tmp_path):
    """Copied into its place it would be half there for a while, and whoever reads the old one would read a mixture."""
    atomic.replace_file(tmp_path / "file", b"first")
    with (tmp_path / "file").open("rb") as reader:
        with atomic.new_file(tmp_path / "file") as file:
            file.write(b"second")
            written = os.fstat(file.fileno()).st_ino
        assert reader.read() == b"first"
    assert (tmp_path / "file").stat().st_ino == written


def test_the_disk_has_the_bytes_before_the_name(tmp_path, monkeypatch):
    fsync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, (tmp_path / "file").exists())))
    atomic.replace_file(tmp_path / "file", b"bytes")
    monkeypatch.setattr(os, "fsync", fsync)
    assert (((tmp_path / "file").stat().st_ino), False) in synced
    assert (tmp_path.stat().st_ino, True) in synced  # and then the name


@pytest.mark.parametrize("kind", ["new_file", "new_files", "new_directory"])
def test_what_a_killed_run_left_goes_away_with_the_next(tmp_path, kind):
    """Whatever the next one writes there, under any name; a run that still lives keeps its own."""
    killed(kind, tmp_path / "big")
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in hidden(tmp_path)] != []
    with atomic.new_file(tmp_path / "other") as file:
        assert len(hidden(tmp_path)) == 1
        atomic.replace_file(tmp_path / "third", b"")
        file.write(b"still there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "third"]
    assert (tmp_path / "other").read_bytes() == b"still there"


def test_only_what_is_its_own_is_swept(tmp_path):
    for name in (".phi3-mlx", ".phi3-mlx-notes", ".x.partial", "phi3-mlx-x.partial"):
        (tmp_path / name).mkdir()
    kept = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "letter").touch()
    (tmp_path / ".phi3-mlx-link.partial").symlink_to(tmp_path / "elsewhere")
    atomic.replace_file(tmp_path / "file", b"")
    assert (tmp_path / "elsewhere" / "letter").exists()
    assert set(kept) < {path.name for path in tmp_path.iterdir()}


def test_writers_at_once_do_not_disturb_each_other(tmp_path):
    def write(n):
        for i in range(20):
            atomic.replace_file(tmp_path / f"file {n % 2}", f"{n}:{i}".encode() * 1000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("file 0", "file 1"):
        content = (tmp_path / name).read_bytes()
        assert content == content[: len(content) // 1000] * 1000
    assert not hidden(tmp_path)


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a directory"])
def test_no_file_replaces_anything_but_a_file(tmp_path, monkeypatch, kind):
    """A device is refused in the same way."""
    import socket

    place = tmp_path / "place"
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as connection:
        {
            "a named pipe": lambda: os.mkfifo(place),
            "a socket": lambda: connection.bind(place.name),  # its whole path may be too long for one
            "a directory": place.mkdir,
        }[kind]()
        before = place.stat()
        link = tmp_path / "link"
        link.symlink_to(place)
        for path in (place, link):
            for write in (atomic.check_file, lambda path: atomic.replace_file(path, b"x")):
                with pytest.raises(OSError, match=f"{kind} is there, which no file replaces") as caught:
                    write(path)
                assert caught.value.filename == str(path)
        assert os.path.samestat(before, place.stat())
        assert stat.S_IFMT(before.st_mode) == stat.S_IFMT(place.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]


def test_what_appears_during_the_work_is_not_replaced_either(tmp_path):
    def write():
        with atomic.new_file(tmp_path / "place"):
            os.mkfifo(tmp_path / "place")

    with pytest.raises(FileExistsError):
        write()
    assert (tmp_path / "place").is_fifo()


def test_links_stay_and_what_they_lead_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_bytes(b"old")
    (tmp_path / "file").symlink_to("disk/old")
    (tmp_path / "dangling").symlink_to("disk/new")
    (tmp_path / "astray").symlink_to("nowhere/new")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("file", "dangling"):
        atomic.replace_file(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path / "disk")) == ["new", "old"]
    for name in ("astray", "circle"):
        for write in (atomic.check_file, lambda path: atomic.replace_file(path, b"x")):
            with pytest.raises(OSError):
                write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
    (tmp_path / "models").symlink_to("disk")
    with atomic.new_directory(tmp_path / "models" / "new model") as folder:
        (folder / "a").touch()
    (tmp_path / "to be").symlink_to("disk/another")
    with atomic.new_directory(tmp_path / "to be") as folder:
        (folder / "a").touch()
    assert sorted(os.listdir(tmp_path / "disk")) == ["another", "new", "new model", "old"]


def test_who_may_read_a_file_stays(tmp_path):
    mask = os.umask(0o022)
    try:
        atomic.replace_file(tmp_path / "file", b"first")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
        (tmp_path / "file").chmod(0o600)
        atomic.replace_file(tmp_path / "file", b"second")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    finally:
        os.umask(mask)


def test_files_of_one_directory_are_replaced_when_all_are_complete(tmp_path, monkeypatch):
    def write(*names, content="new"):
        with atomic.new_files(tmp_path / "out", last="a") as folder:
            for name in names:
                assert sorted(os.listdir(tmp_path)) == (["out"] if (tmp_path / "out").exists() else hidden_names())
                (folder / name).write_text(content)

    def hidden_names():
        return [path.name for path in hidden(tmp_path)]

    write("a", "b", content="old")
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(TypeError):
        write("a", 5)
    assert (tmp_path / "out" / "a").read_text() == "old"
    replaced, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, place: (replaced.append(place.name), replace(self, place)))
    write("a", "c", "b")
    assert sorted(replaced) == ["a", "b", "c"]
    assert replaced[-1] == "a"
    (tmp_path / "out" / "c").unlink()
    assert {name: (tmp_path / "out" / name).read_text() for name in "ab"} == {"a": "new", "b": "new"}
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "b", "mine"]


def test_a_full_disk_is_told_by_the_name_that_was_asked_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.replace_file(tmp_path / "file", b"x")
    assert caught.value.filename == str(tmp_path / "file")
    assert str(caught.value) == f"[Errno 28] No space left on device: '{tmp_path / 'file'}'"

    def directory():
        with atomic.new_directory(tmp_path / "folder", fault=AdapterError) as folder:
            (folder / "a").touch()

    with pytest.raises(AdapterError) as told:
        directory()
    assert str(told.value) == (
        f"{tmp_path / 'folder'} cannot be written: No space left on device; free some space, or name another place"
    )
    assert not os.listdir(tmp_path)


def test_an_empty_directory_may_become_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()  # as the Finder leaves it
    with atomic.new_directory(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "empty") == ["a"]
    with pytest.raises(CheckpointError, match=r"exists already; name another directory$"):
        atomic.check_destination(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="replace it with force=True"):
        atomic.check_destination(tmp_path / "empty", force=False)
    with pytest.raises(CheckpointError, match="where a disk is mounted"):
        atomic.check_destination(Path("/"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # replaced, it would be gone under every program in it
    for here in (Path(""), Path("."), tmp_path / "here"):
        with pytest.raises(CheckpointError, match="is the directory you are in; name one in it"):
            atomic.check_destination(here)


def test_a_directory_called_as_the_old_one_is_hidden_survives_a_kill(tmp_path, monkeypatch):
    """Half a model called "old" or "new" is not taken for the one that was replaced."""
    for name in ("old", "new", "previous"):
        killed("new_directory", tmp_path / name)
        atomic.replace_file(tmp_path / "file", b"")
        assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_held_by_one_run_until_that_dies(tmp_path):
    with atomic.hold(tmp_path / "run") as mine:
        assert mine
        with atomic.hold(tmp_path / "run") as second:
            assert not second
    program = (
        "import sys, time; from pathlib import Path; from phi3_mlx.store import atomic\n"
        "with atomic.hold(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "True\n"
    with atomic.hold(tmp_path / "run") as mine:
        assert not mine
    other.kill()
    other.communicate()
    with atomic.hold(tmp_path / "run") as mine:
        assert mine


def test_a_folder_that_is_removed_while_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    place, locked = tmp_path / "run", atomic._locked

    def removed_first(descriptor, **options):
        monkeypatch.setattr(atomic, "_locked", locked)
        place.rmdir()
        return locked(descriptor, **options)

    monkeypatch.setattr(atomic, "_locked", removed_first)
    with atomic.hold(place) as mine:
        assert mine
        with atomic.hold(place) as second:
            assert not second


def test_a_rename_that_fails_is_told_without_the_hidden_name(tmp_path, monkeypatch):
    def busy(self, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self), None, str(target))

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(OSError, match="busy") as caught:
        atomic.replace_file(tmp_path / "file", b"x")
    assert str(caught.value) == f"[Errno {errno.EBUSY}] {os.strerror(errno.EBUSY)}: '{tmp_path / 'file'}'"


def test_a_directory_is_swapped_with_the_one_it_replaces_in_one_step(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic._exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot swap two names")
    assert (os.listdir(tmp_path / "one"), os.listdir(tmp_path / "two")) == (["two"], ["one"])
    assert not atomic._exchange(tmp_path / "one", tmp_path / "none")


def test_a_replaced_directory_is_put_back_where_the_new_one_cannot_be(tmp_path, monkeypatch):
    """On file systems that cannot swap two names."""
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    place, rename = tmp_path / "model", Path.rename
    place.mkdir()
    (place / "config.json").touch()

    def fails(self, target):
        if target == place and self.parent.name == "new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    def write():
        with atomic.new_directory(place, force=True) as folder:
            (folder / "new").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(CheckpointError, match="busy"):
            write()
    assert os.listdir(place) == ["config.json"]
    write()
    assert (os.listdir(tmp_path), os.listdir(place)) == (["model"], ["new"])


def test_where_nothing_can_be_locked_all_is_written_and_nothing_swept(tmp_path, monkeypatch):
    killed("new_file", tmp_path / "file")
    left = os.listdir(tmp_path)

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    atomic.replace_file(tmp_path / "file", b"x")
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "file"])
    with atomic.hold(tmp_path / "run") as one, atomic.hold(tmp_path / "run") as two:
        assert (one, two) == (True, True)
