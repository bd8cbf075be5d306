"""launch/local.py with processes that only print and end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"


def local(*arguments: str, script: str = "", **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, LOCAL, *arguments, "--", sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, **more,
    )  # fmt: skip


def index_is(index: int) -> str:
    return f"'--process_index={index}' in sys.argv"


def test_a_dry_run_prints_a_command_for_each_process():
    done = local("--processes=3", "--devices=2", "--dry_run", script="a b", env=os.environ | {"XLA_FLAGS": "--xla_a=1"})
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for index, line in enumerate(lines):
        assert "JAX_PLATFORMS=cpu" in line
        assert "XLA_FLAGS='--xla_a=1 --xla_force_host_platform_device_count=2'" in line
        assert "-c 'a b'" in line
        assert "--process_count=3" in line
        assert f"--process_index={index}" in line
    assert len({re.search(r"--distributed=127\.0\.0\.1:(\d+)", line)[1] for line in lines}) == 1


def test_lines_begin_with_the_index():
    done = local("--processes=2", script="import sys; print('out'); print(sys.argv[-2], file=sys.stderr)")
    assert sorted(done.stdout.splitlines()) == [
        "[0] --process_index=0", "[0] out", "[1] --process_index=1", "[1] out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((134, 2), 2), ((75, 3), 3), ((3, 2), 2), ((1, 75), 75), ((0, 7), 7), ((-9, 0), 137)],
)
def test_the_worst_exit_code_is_that_of_all(codes, expected):
    end = "import os, sys; code = {}[{}]; os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
    done = local("--processes=2", script=end.format(codes, f"0 if {index_is(0)} else 1"))
    assert done.returncode == expected


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 1), (75, 3), (134, 3)])
def test_it_starts_again_unless_the_code_is_final(code, starts):
    done = local("--processes=1", "--restarts=2", script=f"import sys; print('here'); sys.exit({code})")
    assert done.returncode == code
    assert done.stdout.count("here") == starts
    assert done.stderr.count("starting again") == starts - 1


def test_a_run_that_succeeds_at_the_second_start_is_done(tmp_path):
    script = (
        f"import pathlib, sys; x = pathlib.Path({str(tmp_path)!r}, 'x'); sys.exit(0 if x.exists() else x.touch() or 75)"
    )
    assert local("--processes=1", "--restarts=5", script=script).returncode == 0


def test_what_does_not_notice_a_death_is_killed():
    """A heartbeat of -29 seconds leaves one."""
    began = time.monotonic()
    script = f"import sys, time; sys.exit(1) if {index_is(0)} else time.sleep(50)"
    assert local("--processes=2", "--heartbeat_seconds=-29", script=script).returncode == 137
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_nothing_starts_again(number):
    script = (
        "import signal, sys, time; got = [];"
        "[signal.signal(n, lambda n, _: got.append(n)) for n in (2, 15)];"
        "print('ready', flush=True); time.sleep(2); time.sleep(1); print(got); sys.exit(75)"
    )
    process = subprocess.Popen(
        [sys.executable, LOCAL, "--processes=2", "--restarts=3", "--", sys.executable, "-c", script],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(2):
        assert "ready" in process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert sorted(out.splitlines()) == [f"[0] [{int(number)}]", f"[1] [{int(number)}]"]
    assert process.returncode == 75


def test_wrong_arguments_are_explained():
    done = local("--processes=0")
    assert done.returncode == 2
    assert "--processes" in done.stderr
