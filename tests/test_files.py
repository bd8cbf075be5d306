"""Files are written whole or not at all, whatever stops the writer; JSON that is wrong is explained."""

import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sddit_jax.errors import CheckpointError, DataError, UserError
from sddit_jax.files import (
    check_output,
    explained,
    json_object,
    read_json,
    sha256_of,
    undamaged,
    whole,
    write_json,
    write_whole,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def full_disk():
    """The size limit of a process stands for a disk with no room for 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, old)


class TestWhole:
    @pytest.mark.parametrize("before", [{}, {"x": b"old"}])
    def test_nothing_is_there_before_the_end(self, tmp_path, before):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        with whole(tmp_path / "x") as file:
            file.write(b"new")
            file.flush()
            assert {name: content for name, content in contents(tmp_path).items() if name[0] != "."} == before
        assert contents(tmp_path) == {"x": b"new"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_body_that_raises_leaves_what_was_there(self, tmp_path, error):
        (tmp_path / "x").write_bytes(b"old")

        def write() -> None:
            with whole(tmp_path / "x") as file:
                file.write(b"new")
                raise error

        with pytest.raises(error):
            write()
        assert contents(tmp_path) == {"x": b"old"}

    @pytest.mark.parametrize("size", [1001, 10**6])
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, full_disk, size):
        (tmp_path / "x").write_bytes(b"old")
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "x", bytes(size))
        assert contents(tmp_path) == {"x": b"old"}

    def test_a_disk_that_fails_at_the_last_moment_leaves_what_was_there(self, tmp_path, monkeypatch):
        def fail(descriptor):
            raise OSError("no")

        (tmp_path / "x").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no"):
            write_whole(tmp_path / "x", b"new")
        assert contents(tmp_path) == {"x": b"old"}

    def test_the_bytes_are_on_the_disk_before_the_name(self, tmp_path, monkeypatch):
        synced, fsync = [], os.fsync

        def look(descriptor):
            synced.append((os.pread(descriptor, 10, 0), (tmp_path / "x").exists()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", look)
        write_whole(tmp_path / "x", b"new")
        assert synced == [(b"new", False)]

    def test_a_process_killed_in_the_middle_leaves_what_was_there_and_the_next_removes_the_rest(self, tmp_path):
        script = (
            "import os, signal, sys; from sddit_jax.files import whole\n"
            "with whole(sys.argv[1]) as file:\n"
            "    file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        (tmp_path / "x").write_bytes(b"old")
        # Files of others that look alike.
        others = {".x.swp": b"1", ".x.y.0badf00d": b"2", ".x.0badf00d9": b"3"}
        for name, content in others.items():
            (tmp_path / name).write_bytes(content)
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")])
        assert done.returncode == -signal.SIGKILL
        assert sorted(contents(tmp_path).values()) == [b"1", b"2", b"3", b"new", b"old"]
        write_whole(tmp_path / "x", b"newer")
        assert contents(tmp_path) == {"x": b"newer"} | others

    def test_two_that_write_one_file_do_not_mix_their_bytes(self, tmp_path):
        both = threading.Barrier(2)

        def write(content: bytes) -> None:
            for _ in range(50):
                with whole(tmp_path / "x") as file:
                    file.write(content)
                    both.wait(60)
                    file.write(content)
                assert (tmp_path / "x").read_bytes() in (b"aa", b"bb")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, [b"a", b"b"]))
        assert contents(tmp_path) in ({"x": b"aa"}, {"x": b"bb"})

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
    def test_permissions_are_those_of_open(self, tmp_path, umask, mode):
        def by_a_library(path: str) -> None:
            Path(f"{path}.own").touch(0o600)
            os.replace(f"{path}.own", path)

        old = os.umask(umask)
        try:
            write_whole(tmp_path / "x", b"new")
            with whole(tmp_path / "y") as file:
                by_a_library(file.name)
        finally:
            os.umask(old)
        for name in "xy":
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode

    def test_a_library_opens_it_by_its_name(self, tmp_path):
        with whole(tmp_path / "x") as file:
            Path(file.name).write_bytes(b"new")
        assert contents(tmp_path) == {"x": b"new"}

    def test_the_unfinished_file_lies_in_the_folder_that_is_given(self, tmp_path):
        (tmp_path / "parts").mkdir()
        with whole(tmp_path / "x", tmp_path / "parts"):
            assert contents(tmp_path) == {}
            assert len(contents(tmp_path / "parts")) == 1
        assert contents(tmp_path) == {"x": b""}
        assert contents(tmp_path / "parts") == {}

    def test_a_link_stays_and_a_pipe_is_written(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder/x")
        write_whole(tmp_path / "link", b"new")
        assert (tmp_path / "link").is_symlink()
        assert contents(tmp_path / "folder") == {"x": b"new"}
        os.mkfifo(tmp_path / "pipe")
        with ThreadPoolExecutor() as pool:
            read = pool.submit((tmp_path / "pipe").read_bytes)
            write_whole(tmp_path / "pipe", b"new")
            assert read.result(60) == b"new"
        assert (tmp_path / "pipe").is_fifo()

    def test_json_is_read_back(self, tmp_path):
        value = {"ü": [1, None, 0.1], "a": {}}
        write_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_text()) == value == read_json(tmp_path / "x.json", DataError)


class TestExplained:
    def test_what_a_disk_raises_becomes_the_callers_error(self, tmp_path):
        path = tmp_path / "none" / "x"
        message = rf"^{path} could not be written: .*No such file.*; others stay$"
        with pytest.raises(CheckpointError, match=message), explained(path, CheckpointError, ending="; others stay"):
            write_whole(path, b"")
        message = r"^--output=x could not be written: full$"
        with pytest.raises(UserError, match=message), explained("--output=x", UserError, RuntimeError):
            raise RuntimeError("full")

    def test_other_errors_pass(self):
        with pytest.raises(DataError, match="mine"), explained("x", UserError):
            raise DataError("mine")
        with pytest.raises(RuntimeError), explained("x", UserError):
            raise RuntimeError

    def test_where_nothing_can_be_written_is_known_before(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        for path in ("file", "new", "/dev/null"):
            check_output(tmp_path / path)
        for path, why in (
            (".", "it is a folder"),
            ("none/x", "none is not a folder"),
            ("file/x", "file is not a folder"),
        ):
            with pytest.raises(UserError, match=f"could not be written: .*{why}"):
                check_output(tmp_path / path)
        for closed, paths in ((tmp_path, ["file", "new"]), (tmp_path / "file", ["file"])):
            monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: path != closed)
            for path in paths:
                with pytest.raises(UserError, match=f"{path} could not be written: there is no permission"):
                    check_output(tmp_path / path)


class TestReading:
    def test_hash(self, tmp_path):
        (tmp_path / "x").write_bytes(bytes(range(256)) * 10_000)
        assert sha256_of(tmp_path / "x") == hashlib.sha256(bytes(range(256)) * 10_000).hexdigest()

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "Expecting value"),
            (b'{"a": 1', "Expecting"),
            (b'{"a": "\xff"}', "codec can't decode"),
            (b"[" * 100_000, "nested too deep"),
            (b'{"a":' * 100_000, "nested too deep"),
            (b"[1]", "holds a list instead of an object"),
            (b"null", "holds a NoneType"),
            (b'{"a": ' + b"1" * 5000 + b"}", "integer"),
        ],
    )
    def test_what_is_no_object_is_explained(self, tmp_path, content, why):
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            json_object(content)
        with pytest.raises(DataError, match=f"^{path} cannot be read as JSON: .*{why}.*; delete it$"):
            read_json(path, DataError, ending="; delete it")

    @pytest.mark.parametrize("value", [{}, {"a": None}, {"a": []}, {"a": {"b": "one"}}])
    def test_other_values_are_explained(self, value):
        message = r"^x.json is damaged: \w+Error: .*; delete it$"
        with pytest.raises(DataError, match=message), undamaged(Path("x.json"), DataError, ending="; delete it"):
            int(value["a"]["b"])

    def test_what_cannot_be_read_is_explained(self, tmp_path):
        for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
            with pytest.raises(CheckpointError, match=f"^{path} cannot be read as JSON: .*{why}"):
                read_json(path, CheckpointError)
