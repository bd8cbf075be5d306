"""The scripts of launch/, run for real against commands that stand in for gcloud, kubectl and SLURM (stub.py)."""

import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STUBS = ("gcloud", "kubectl", "srun", "scancel", "squeue", "scontrol", "sleep", "python3", "training")
ODD = """it's "quoted" $HOME $(x) \\ ü; # *"""
RUN = ["--config=configs/a.py:size=B/2", "--workdir=~/runs/a"]


class World:
    """A folder of stand-ins first on the PATH, and what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "stub"
        self.workdir = folder / "run s"
        commands = folder / "bin"
        commands.mkdir()
        self.folder.mkdir()
        script = f"#!{sys.executable} -SE\n" + (Path(__file__).parent / "stub.py").read_text()
        for name in STUBS:
            (commands / name).write_text(script)
            (commands / name).chmod(0o755)
        self.training = str(commands / "training")
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(self.training)
        path = os.pathsep.join([str(commands), os.defpath.replace(os.pathsep + ".", ""), "/usr/bin", "/bin"])
        self.environment = {
            "PATH": path, "STUB": str(self.folder), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"),
        }  # fmt: skip

    def write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *command: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, env=self.environment | environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, env=self.environment | environment, cwd=ROOT, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def calls(self, *names: str) -> list[list[str]]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if call[0] in names]

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def restart(self, *flags: str) -> list[str]:
        return [str(LAUNCH / "restart.sh"), *flags, self.training, "--config=c", f"--workdir={self.workdir}"]

    def tpu(self, command: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        return self.run(str(LAUNCH / "tpu.sh"), command, *arguments, code=code, **environment)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    for file in world.folder.glob("worker?/sddit_jax_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(scripts) == 5
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "restart.sh"])
def test_head_names_every_flag(script):
    text = (LAUNCH / script).read_text()
    head = "\n".join(line for line in text.splitlines()[:45] if line.startswith("#"))
    flags = set(re.findall(r"^    (--[a-z_]+)\S*(?: \| --\S+)*\) ", text, re.MULTILINE))
    assert len(flags) >= 3
    assert not {flag for flag in flags if flag not in head}


class TestRestart:
    @pytest.mark.parametrize(
        ("plan", "code", "runs"),
        [
            (["0"], 0, 1),
            (["2"], 2, 1),
            (["3"], 3, 1),
            (["75 10", "134", "kill", "1", "0"], 0, 5),
            (["134", "75", "2"], 2, 3),
            (["kill", "3", "0"], 3, 2),
            (["134"] * 9, 1, 4),
            (["134 5", *["134"] * 9], 1, 5),
            # A step that was there before, or a lower one, is no progress.
            (["134 5", "134 5", "134 4", "134 5", "134 5", "0"], 1, 5),
            (["134", "134", "134 1", "134", "134", "134 20", "134", "134", "134 100", "0"], 0, 10),
        ],
    )
    def test_starts_again_by_exit_code_until_no_progress(self, world, plan, code, runs):
        world.write("plan", *plan)
        done = world.run(*world.restart("--retries=3", f"--run={world.folder}/r"), code=code)
        assert len(world.calls("training")) == runs
        assert (world.folder / "r" / "exit_code").read_text() == f"{code}\n"
        assert ("error: exit code 134; 4 runs in a row" in done.stderr) == (code == 1)

    def test_arguments_reach_the_command(self, world):
        world.run(*world.restart(), f"--config.note={ODD}", "", "a b")
        expected = ["training", "--config=c", f"--workdir={world.workdir}", f"--config.note={ODD}", "", "a b"]
        assert world.calls("training") == [expected]

    def test_pauses_double_without_progress(self, world):
        world.write("plan", *["134"] * 4, "134 7", *["134"] * 8, "0")
        world.run(*world.restart("--retries=9", "--delay=10"))
        pauses = [int(call[1]) for call in world.calls("sleep")]
        assert pauses == [10, 20, 40, 80, 10, 10, 20, 40, 80, 160, 320, 600, 600]

    @pytest.mark.parametrize(
        ("plan", "to"), [("wait 30", "the script"), ("late 30", "the script"), ("wait 30", "all processes")]
    )
    def test_sigterm_saves_and_ends(self, world, plan, to):
        """One that comes before the training has a handler waits for it; one that all get counts once."""
        world.write("plan", plan, "0")
        process = world.start(*world.restart(f"--run={world.folder}/r"))
        ready = world.folder / ("ready" if plan.startswith("wait") else "training.pid")
        world.wait(ready.exists)
        (os.kill if to == "the script" else os.killpg)(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75, output
        assert "stopped with exit code 75, newest checkpoint 30" in output
        assert len(world.calls("training")) == 1
        assert (world.folder / "r" / "exit_code").read_text() == "75\n"

    def test_sigterm_in_a_pause_ends_it(self, world):
        world.write("plan", "134")
        (Path(world.training).parent / "sleep").unlink()
        process = world.start(*world.restart("--delay=600"))
        assert "starting again in 600 s" in process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75
        assert len(world.calls("training")) == 1

    def test_a_run_is_started_once(self, world):
        world.write("plan", "wait")
        process = world.start(*world.restart(f"--run={world.folder}/r"))
        world.wait((world.folder / "ready").exists)
        second = world.run(*world.restart(f"--run={world.folder}/r"), code=2)
        assert second.stderr == f"error: {world.folder}/r/lock is locked: the run is running already\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tpu.sh", "unknown command ''; it is create, install,"),
        ("tpu.sh make a", "unknown command 'make'; it is create, install,"),
        ("tpu.sh create A_b", "'A_b' is no name of a TPU"),
        ("tpu.sh create", "'' is no name of a TPU"),
        ("tpu.sh create a", "create needs --type=TYPE"),
        ("tpu.sh create a --type=v9-8", "--type=v9-8: its runtime version is not known here"),
        ("tpu.sh create a --tpye=v4-8", "unknown argument --tpye=v4-8"),
        ("tpu.sh create a --zone=", "unknown argument --zone="),
        ("tpu.sh log a --worker=all", "--worker=all is not a number"),
        ("tpu.sh install a --revision=main", "--revision=main needs --repository=URL"),
        ("tpu.sh start a", "lack --config=FILE"),
        ("tpu.sh start a -- --config=c", "lack --workdir=FOLDER"),
        (
            "tpu.sh watch a --type=v4-8 -- --config=c --workdir=gs://b/run",
            "--workdir=gs://b/run: it should be a folder",
        ),
        ("gke.sh run a", "unknown command 'run'; it is apply, render,"),
        (f"gke.sh apply {41 * 'a'}", "is no name of a JobSet"),
        ("gke.sh apply a -- --config=c --workdir=/w", "--type=: it should be v4, v5e, v5p or v6e"),
        ("gke.sh apply a --type=v5e --topology=2x2x4 --image=i -- --config=c --workdir=/w", "v5e has 2 dimensions"),
        ("gke.sh apply a --type=v4 --topology=4x4 --image=i -- --config=c --workdir=/w", "v4 has 3 dimensions"),
        ("gke.sh apply a --type=v4 --topology=2x2x1 -- --config=c --workdir=/w", "needs --image=IMAGE"),
        ("gke.sh apply a --grace=0 -- --config=c --workdir=/w", "--grace=0 is not a number of 1 or more"),
        (
            "gke.sh apply a --type=v5e --topology=2x2 --chips_per_host=8 --image=i -- --config=c --workdir=/w",
            "--topology=2x2 has 4 chips, no multiple of 8 a host",
        ),
        ("gke.sh apply a --claim=data -- --config=c --workdir=/w", "unknown argument --claim=data"),
        ("restart.sh --tries=1 x", "unknown argument --tries=1"),
        ("restart.sh --retries=x", "--retries=x is not a number"),
        ("restart.sh", "needs a command"),
        ("slurm.sh --config=c --workdir=w", "sbatch [OPTIONS] launch/slurm.sh ARGUMENTS"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(world, arguments, message):
    script, *words = arguments.split()
    done = world.run(str(LAUNCH / script), *words, code=2)
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert message in done.stderr
    assert world.calls(*STUBS) == []


PLACE = ["--zone=us-west4-a", "--project=p"]
NOT_RUNNING = "{ [ ! -e sddit_jax_run/lock ] || flock --nonblock sddit_jax_run/lock true; }"
SAY = 'echo "sddit_jax $(hostname)":'
UV = (
    "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv && "
    "python3 -m uv venv --quiet --allow-existing --python=3.12 sddit_jax_venv && "
    'python3 -m uv pip install --quiet --python=sddit_jax_venv/bin/python "./sddit_jax[tpu]"'
)


def vm(what: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", what, "a", *words]


def queued(what: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", what, "a", *words]


def started(arguments: str, environment: str = "", setup: str = ":", retries: int = 5, busy: int = 2) -> str:
    return (
        f"{NOT_RUNNING} || {{ {SAY} runs already; exit {busy}; }}; "
        f"[ -x sddit_jax/launch/restart.sh ] || {{ {SAY} not installed; exit 2; }}; "
        f"bash -c {setup} && mkdir -p sddit_jax_run && rm -f sddit_jax_run/exit_code && cd sddit_jax && "
        f"{{ env {environment}setsid nohup launch/restart.sh --run=../sddit_jax_run --retries={retries} "
        f"../sddit_jax_venv/bin/python -m sddit_jax.main --distributed=auto {arguments} "
        f">>../sddit_jax_run/log 2>&1 </dev/null & }}"
    )


CLONED = f"{NOT_RUNNING} || {{ {SAY} runs already; exit 2; }}; rm -rf sddit_jax && git clone --quiet -- "
STATES = (
    f"s=idle; if ! [ -x sddit_jax/launch/restart.sh ]; then s=missing; elif ! {NOT_RUNNING}; then s=running; "
    'elif [ -s sddit_jax_run/exit_code ]; then s="exit $(cat sddit_jax_run/exit_code)"; '
    f'elif [ -e sddit_jax_run/lock ]; then s=lost; fi; {SAY} "$s"'
)
DRY_RUNS = [
    (
        ["create", "a", *PLACE, "--type=v5litepod-16"],
        [vm("create", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", *PLACE)],
    ),
    (
        ["create", "a", "--type=v4-32", "--spot", "--create_flag=--network=n", "--create_flag=--description=an a's"],
        [
            vm(
                "create", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base", "--spot",
                "--network=n", "--description=an a's",
            )
        ],
    ),
    (
        ["create", "a", *PLACE, "--type=v6e-16", "--queued", "--spot"],
        [
            queued(
                "create", "--node-id=a", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
                *PLACE, "--spot",
            )
        ],
    ),
    (
        ["create", "a", "--type=v5p-8", "--version=mine"],
        [vm("create", "--accelerator-type=v5p-8", "--version=mine")],
    ),
    (
        ["install", "a", *PLACE, "--repository=https://x/y z.git", "--revision=v1"],
        [
            vm(
                "ssh", *PLACE, "--worker=all",
                f"--command={CLONED}'https://x/y z.git' sddit_jax && git -C sddit_jax checkout --quiet v1 && {UV}",
            )
        ],
    ),
    (
        ["start", "a", "--", *RUN],
        [vm("ssh", "--worker=all", "--command=" + started("--config=configs/a.py:size=B/2 '--workdir=~/runs/a'"))],
    ),
    (
        ["start", "a", "--ssh_flag=--internal-ip", "--retries=9", "--setup=mount /d || true", "--env=A=1 2", "--env=B=",
         "--", "--config=c", "--workdir=/my runs/a"],
        [
            vm(
                "ssh", "--worker=all",
                "--command=" + started("--config=c '--workdir=/my runs/a'", "'A=1 2' B= ", "'mount /d || true'", 9),
                "--internal-ip",
            )
        ],
    ),
    (["log", "a", *PLACE], [vm("ssh", *PLACE, "--worker=0", "--command=tail -n 100 -F sddit_jax_run/log")]),
    (["log", "a", "--worker=3"], [vm("ssh", "--worker=3", "--command=tail -n 100 -F sddit_jax_run/log")]),
    (
        ["status", "a"],
        [vm("describe", "--format=value(state)"), vm("ssh", "--worker=all", f"--command={STATES}")],
    ),
    (
        ["stop", "a"],
        [
            vm(
                "ssh", "--worker=all",
                f'--command={NOT_RUNNING} || {{ kill -TERM "$(cat sddit_jax_run/pid)"; flock sddit_jax_run/lock true; '
                f"}}; {STATES}",
            )
        ],
    ),
    (["delete", "a", *PLACE], [vm("delete", *PLACE, "--quiet")]),
    (["delete", "a", "--queued"], [queued("delete", "--force", "--quiet")]),
    (
        ["watch", "a", "--queued", "--type=v5p-8", "--repository=u", "--", "--config=c", "--workdir=/w"],
        [
            queued("describe", "--format=value(state.state)"),
            queued("create", "--node-id=a", "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"),
            vm("describe", "--format=value(state)"),
            vm("ssh", "--worker=all", f"--command={CLONED}u sddit_jax && {UV}"),
            vm("ssh", "--worker=all", f"--command={started('--config=c --workdir=/w', busy=0)}"),
            vm("ssh", "--worker=all", f"--command={STATES}"),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"), DRY_RUNS, ids=[arguments[0] + str(i) for i, (arguments, _) in enumerate(DRY_RUNS)]
)
def test_dry_run_prints_what_a_shell_runs(world, arguments, expected):
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    done = world.tpu(*arguments[:separator], "--dry_run", *arguments[separator:])
    assert world.calls(*STUBS) == []
    assert world.tpu(*arguments, DRY_RUN="1").stdout == done.stdout
    # Pasted, each line is one call with exactly these arguments.
    shutil.copytree(Path(world.training).parent, world.folder / "recorders", symlinks=True)
    (world.folder / "recorders" / "gcloud").write_text(
        f"#!{sys.executable} -SE\nimport json, sys\nprint(json.dumps(['gcloud', *sys.argv[1:]]))\n"
    )
    pasted = world.run("bash", "-c", done.stdout, PATH=f"{world.folder}/recorders:{world.environment['PATH']}")
    assert [json.loads(line) for line in pasted.stdout.splitlines()] == expected
    assert len(done.stdout.splitlines()) == len(expected)


def test_dry_run_of_install_copies_the_folder(world):
    lines = world.tpu("install", "a", "--zone=z", "--dry_run").stdout.splitlines()
    archive = f"{world.environment['XDG_CACHE_HOME']}/sddit_jax/a.tar.gz"
    assert lines[0] == f"mkdir -p {Path(archive).parent}"
    assert lines[1].startswith(f"tar -czf {archive} -C {ROOT} --exclude=__pycache__ ")
    for path in lines[1].split("__pycache__ ")[1].split():
        assert (ROOT / path).exists()
    assert lines[2] == f"gcloud compute tpus tpu-vm scp {archive} a:sddit_jax.tar.gz --zone=z --worker=all"
    assert lines[3].startswith("gcloud compute tpus tpu-vm ssh a --zone=z --worker=all '--command=")


class TestTPU:
    def run_of(self, world, *plans: str) -> list[str]:
        """Flags and arguments that run the plans, one on each worker; all save in one folder."""
        setup = " ".join(f"[ $WORKER = worker{i} ] && echo {plan} >~/plan;" for i, plan in enumerate(plans))
        return [
            f"--setup={setup or ':'} true",
            "--poll=0",
            "--",
            "--config=configs/digits.py",
            f"--workdir={world.workdir}",
        ]

    def states(self, world) -> list[str]:
        lines = world.tpu("status", "a").stdout.splitlines()
        return [line.split(": ")[1] for line in lines if line.startswith("sddit_jax ")]

    def test_each_step_does_its_work(self, world):
        arguments = [*self.run_of(world, "wait", "wait"), f"--config.note={ODD}"]
        world.tpu("create", "a", "--type=v4-16")
        assert self.states(world) == ["missing", "missing"]
        assert "not installed" in world.tpu("start", "a", *arguments, code=2).stdout
        world.tpu("install", "a")
        assert (world.folder / "worker1" / "sddit_jax" / "configs" / "digits.py").is_file()
        assert self.states(world) == ["idle", "idle"]
        world.tpu("start", "a", "--env=NOTE=it's", *arguments)
        world.wait(lambda: len(world.calls("python")) == 2)
        assert world.calls("python")[0] == [
            "python", "-m", "sddit_jax.main", "--distributed=auto", "--config=configs/digits.py",
            f"--workdir={world.workdir}", f"--config.note={ODD}",
        ]  # fmt: skip
        assert self.states(world) == ["running", "running"]
        assert "runs already" in world.tpu("start", "a", *arguments, code=2).stdout
        assert "runs already" in world.tpu("install", "a", code=2).stdout
        done = world.tpu("stop", "a")
        assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["exit 75", "exit 75"]
        assert self.states(world) == ["exit 75", "exit 75"]
        assert "stopped with exit code 75" in (world.folder / "worker0" / "sddit_jax_run" / "log").read_text()
        world.tpu("delete", "a")
        assert not (world.folder / "worker0").exists()

    def test_watch_from_nothing_to_the_end(self, world):
        world.write("states", "CREATING CREATING READY")
        done = world.tpu("watch", "a", "--type=v4-16", *self.run_of(world, "0", "0"))
        assert "done; the TPU is still there: launch/tpu.sh delete a" in done.stdout
        assert len(world.calls("python")) == 2
        assert sum(call[4] == "create" for call in world.calls("gcloud")) == 1

    @pytest.mark.parametrize("kind", ["spot", "queued"])
    def test_watch_creates_a_preempted_tpu_again(self, world, kind):
        lost, ready = ("SUSPENDED", "ACTIVE") if kind == "queued" else ("PREEMPTED", "READY")
        waiting = "ACCEPTED WAITING_FOR_RESOURCES PROVISIONING" if kind == "queued" else "CREATING"
        world.write("states", f"{waiting} {ready} {ready} {ready} {lost}", f"{waiting} {lost}", f"{waiting} {ready}")
        world.write("plan", "wait", "wait", "0", "0")
        done = world.tpu(
            "watch", "a", "--type=v6e-16", "--spot", *["--queued"] * (kind == "queued"), *self.run_of(world)
        )
        assert [call[4] for call in world.calls("gcloud") if call[4] in ("create", "delete")] == [
            "create", "delete", "create", "delete", "create",
        ]  # fmt: skip
        assert all("--spot" in call for call in world.calls("gcloud") if call[4] == "create")
        assert len(world.calls("python")) == 4
        assert done.stdout.count("exit 0") == 2

    def test_watch_starts_again_after_a_reboot(self, world):
        world.write("states", "READY READY READY REBOOTED READY")
        world.write("plan", "wait", "wait", "0", "0")
        world.tpu("watch", "a", "--type=v4-16", *self.run_of(world))
        assert len(world.calls("python")) == 4
        assert sum(call[4] == "scp" for call in world.calls("gcloud")) == 1

    def test_watch_waits_for_capacity_and_not_for_permission(self, world):
        world.write("create_errors", 'ERROR: There is no more capacity in the zone "z"', "ERROR: PERMISSION_DENIED")
        done = world.tpu("watch", "a", "--type=v4-16", *self.run_of(world), code=1)
        assert "no more capacity" in done.stderr
        assert "PERMISSION_DENIED" in done.stderr
        assert sum(call[4] == "create" for call in world.calls("gcloud")) == 2

    @pytest.mark.parametrize(("plans", "code"), [(["3", "3"], 3), (["2", "wait"], 2), (["wait", "2"], 2)])
    def test_watch_ends_with_a_final_exit_code(self, world, plans, code):
        world.tpu("watch", "a", "--type=v4-16", *self.run_of(world, *plans), code=code)
        world.wait(lambda: "running" not in self.states(world))
        assert len(world.calls("python")) == 2

    def test_watch_ends_when_the_run_gives_up(self, world):
        world.write("plan", *["134"] * 4)
        world.tpu("watch", "a", "--type=v4-16", "--retries=1", *self.run_of(world), code=1)
        assert len(world.calls("python")) == 4

    def test_watch_gives_up_a_tpu_that_never_runs(self, world):
        world.write("states", *["READY FAILED"] * 20)
        world.write("create_errors")
        done = world.tpu(
            "watch",
            "a",
            "--type=v4-16",
            "--queued",
            "--retries=1",
            "--repository=/nowhere",
            *self.run_of(world),
            code=1,
        )
        assert "was not seen running" in done.stderr

    def test_watch_does_not_take_an_earlier_end_for_its_own(self, world):
        world.tpu("watch", "a", "--type=v4-16", *self.run_of(world, "3", "3"), code=3)
        world.tpu("watch", "a", "--type=v4-16", *self.run_of(world, "0", "0"))
        assert len(world.calls("python")) == 4


TOPOLOGIES = [
    ("v5e", "1x1", "tpu-v5-lite-podslice", 1, 1),
    ("v5e", "2x2", "tpu-v5-lite-podslice", 1, 4),
    ("v5e", "2x4", "tpu-v5-lite-podslice", 1, 8),
    ("v5e", "4x4", "tpu-v5-lite-podslice", 4, 4),
    ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
    ("v6e", "2x4", "tpu-v6e-slice", 1, 8),
    ("v6e", "4x8", "tpu-v6e-slice", 8, 4),
    ("v4", "2x2x1", "tpu-v4-podslice", 1, 4),
    ("v4", "2x2x2", "tpu-v4-podslice", 2, 4),
    ("v4", "4x4x4", "tpu-v4-podslice", 16, 4),
    ("v5p", "2x2x4", "tpu-v5p-slice", 4, 4),
    ("v5p", "4x4x8", "tpu-v5p-slice", 32, 4),
]


class TestGKE:
    def gke(self, world, command: str, *arguments: str) -> str:
        return world.run(str(LAUNCH / "gke.sh"), command, "run1", *arguments).stdout

    @pytest.mark.parametrize(("type_", "topology", "accelerator", "hosts", "chips"), TOPOLOGIES)
    def test_manifest(self, world, type_, topology, accelerator, hosts, chips):
        flags = [f"--type={type_}", f"--topology={topology}", "--image=i"]
        manifest = yaml.safe_load(self.gke(world, "render", *flags, "--", "--config=c", "--workdir=/w"))
        assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        spec = manifest["spec"]
        assert spec["network"] == {"enableDNSHostnames": True}
        assert spec["failurePolicy"] == {
            "maxRestarts": 100,
            "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        }
        (job,) = spec["replicatedJobs"]
        assert job["replicas"] == 1
        job = job["template"]["spec"]
        assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
        assert job["backoffLimit"] == 0
        codes = {"containerName": "train", "operator": "In", "values": [2, 3]}
        assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
        pod = job["template"]["spec"]
        assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        assert "tolerations" not in pod
        (container,) = pod["containers"]
        assert container["command"] == ["python", "-m", "sddit_jax.main"]
        assert container["args"] == ["--distributed=auto", "--config=c", "--workdir=/w"]
        assert container["resources"] == {"limits": {"google.com/tpu": chips}}

    def test_choices(self, world):
        note = f"{ODD}\n\ttwo lines: [a, b] - !x"
        arguments = [
            "--type=v5e", "--topology=2x4", "--image=region/i:1", "--chips_per_host=4", "--spot", "--claim=data:/data",
            "--claim=more:/more", "--bucket=b:/mnt/b c", "--service_account=sa", "--max_restarts=7", "--grace=60",
            "--env=NO=1", f"--env=NOTE={note}", "--namespace=team", "--", "--config=c", "--workdir=/data/my runs",
            f"--config.note={note}",
        ]  # fmt: skip
        text = self.gke(world, "render", *arguments)
        manifest = yaml.safe_load(text)
        assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
        job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["parallelism"] == 2
        assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
        pod = job["template"]["spec"]
        assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("sa", 60)
        assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
        container = pod["containers"][0]
        # Kubernetes makes $(x) of $$(x).
        escaped = note.replace("$(x)", "$$(x)")
        assert container["args"][1:] == ["--config=c", "--workdir=/data/my runs", f"--config.note={escaped}"]
        assert container["env"] == [{"name": "NO", "value": "1"}, {"name": "NOTE", "value": escaped}]
        assert container["volumeMounts"] == [
            {"name": "claim-0", "mountPath": "/data"},
            {"name": "claim-1", "mountPath": "/more"},
            {"name": "bucket-0", "mountPath": "/mnt/b c"},
        ]
        assert [volume["name"] for volume in pod["volumes"]] == ["claim-0", "claim-1", "bucket-0"]
        assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "more"}
        assert pod["volumes"][2]["csi"] == {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": "b", "mountOptions": "implicit-dirs"},
        }

        self.gke(world, "apply", *arguments)
        assert world.calls("kubectl") == [["kubectl", "apply", "--namespace=team", "--filename=-"]]
        assert (world.folder / "manifest").read_text() == text
        (world.folder / "manifest").unlink()
        pasted = world.run(str(LAUNCH / "gke.sh"), "apply", "run1", *arguments, DRY_RUN="1").stdout
        assert len(world.calls("kubectl")) == 1
        world.run("bash", "-c", pasted)
        assert (world.folder / "manifest").read_text() == text

    def test_other_commands(self, world):
        selector = "--selector=jobset.sigs.k8s.io/jobset-name=run1"
        expected = {
            "delete": [["kubectl", "delete", "jobset", "run1", "--namespace=n"]],
            "status": [
                ["kubectl", "get", "jobset", "run1", "--namespace=n"],
                ["kubectl", "get", "pods", selector, "--output=wide", "--namespace=n"],
            ],
            "log": [
                [
                    "kubectl", "logs", "--follow", "--tail=100", "--container=train",
                    f"{selector},batch.kubernetes.io/job-completion-index=0", "--namespace=n",
                ]
            ],
        }  # fmt: skip
        for command, calls in expected.items():
            printed = self.gke(world, command, "--namespace=n", "--dry_run")
            assert printed.splitlines() == [" ".join(call) for call in calls]
            before = len(world.calls("kubectl"))
            self.gke(world, command, "--namespace=n")
            assert world.calls("kubectl")[before:] == calls


class TestSLURM:
    @pytest.fixture(autouse=True)
    def job(self, world):
        world.environment |= {
            "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
            "SLURM_NTASKS": "8", "SDDIT_VENV": str(world.folder.parent / "venv"),
        }  # fmt: skip
        world.write("job_state", "RUNNING")
        # As SLURM, which runs a copy of the script.
        self.script = shutil.copy(LAUNCH / "slurm.sh", world.folder / "script")

    def slurm(self, world, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        words = [self.script, "--config=c", f"--workdir={world.workdir}", *arguments]
        return world.run("bash", *words, code=code, **environment)

    def test_options(self):
        options = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
        assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} < set(options)

    def test_one_process_for_each_gpu(self, world):
        self.slurm(world, f"--config.note={ODD}", SLURM_CPUS_PER_TASK="8")
        python = f"{world.environment['SDDIT_VENV']}/bin/python"
        assert world.calls("srun") == [
            [
                "srun", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=600", "--cpus-per-task=8", python, "-m",
                "sddit_jax.main", "--distributed=auto", "--config=c", f"--workdir={world.workdir}",
                f"--config.note={ODD}",
            ]
        ]  # fmt: skip
        assert world.calls("scontrol") == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"SLURM_NTASKS": "2"}, "2 tasks for 8 GPUs, but each needs one: sbatch --ntasks-per-node=4"),
            ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs: sbatch --gpus-per-node=N"),
            ({"SDDIT_VENV": "/nowhere"}, "SDDIT_VENV=/nowhere: there is no /nowhere/bin/python"),
            ({"SDDIT_RETRIES": "x"}, "SDDIT_RETRIES=x is not a number"),
            ({"SLURM_SUBMIT_DIR": "/"}, "start this from the folder of the repository"),
        ],
    )
    def test_a_wrong_environment_is_named(self, world, changes, message):
        done = self.slurm(world, code=2, **changes)
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
        assert message in done.stderr
        assert world.calls("srun") == []

    def test_container(self, world):
        commands = Path(world.training).parent
        (commands / "python").symlink_to(commands / "training")
        self.slurm(world, SDDIT_CONTAINER="i:1", SDDIT_CONTAINER_MOUNTS="/data:/data")
        (call,) = world.calls("srun")
        assert f"--container-mounts={ROOT}:{ROOT},{world.workdir}:{world.workdir},/data:/data" in call
        assert "--container-image=i:1" in call
        assert call[call.index("-m") - 1] == "python"

    @pytest.mark.parametrize("code", [0, 2, 3])
    def test_final_exit_codes_end_the_job(self, world, code):
        world.write("plan", str(code))
        self.slurm(world, code=code)
        assert world.calls("scontrol") == []

    def test_queued_again_until_no_progress(self, world):
        """Each line is a run of the job; the queue starts it again after each but the last."""
        world.write("plan", "134", "134 10", "134", "kill", "75", "134 20", "134", "134", "134")
        for run in range(9):
            done = self.slurm(world, code=0 if run < 8 else 1, SDDIT_RETRIES="3" if run < 8 else "2")
            assert len(world.calls("scontrol")) == min(run + 1, 8)
        assert world.calls("scontrol")[0] == ["scontrol", "requeue", "17"]
        assert "error: exit code 134; 3 runs in a row ended without a new checkpoint" in done.stderr
        # Another job counts from the start.
        world.write("plan", "134")
        self.slurm(world, SDDIT_RETRIES="2", SLURM_JOB_ID="18")
        assert world.calls("scontrol")[-1] == ["scontrol", "requeue", "18"]

    @pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
    def test_sigterm_saves_and_a_cancelled_job_stays_so(self, world, state):
        world.write("plan", "wait 40")
        world.write("job_state", state)
        process = world.start("bash", self.script, "--config=c", f"--workdir={world.workdir}")
        world.wait((world.folder / "ready").exists)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert world.calls("scancel") == [["scancel", "--signal=TERM", "17"]]
        assert (world.workdir / "checkpoints" / "40").is_dir()
        if state == "RUNNING":
            assert process.returncode == 0, output
            assert world.calls("scontrol") == [["scontrol", "requeue", "17"]]
        else:
            assert process.returncode == 75
            assert world.calls("scontrol") == []


@pytest.mark.parametrize(("kind", "jax"), [("tpu", "tpu"), ("cuda", "cuda12")])
def test_images_name_what_exists(kind, jax):
    from importlib.metadata import metadata

    text = (LAUNCH / f"Dockerfile.{kind}").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extra,) = re.findall(r"pip install --no-cache-dir '\.\[(\w+)\]'", text)
    assert extra == kind
    assert setup["options.extras_require"][extra].strip().startswith(f"jax[{jax}]")
    assert jax in metadata("jax").get_all("Provides-Extra")
    copied = [source for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for source in line.split()]
    assert {"pyproject.toml", "setup.cfg", "sddit_jax", "configs"} < set(copied)
    assert setup["metadata"]["long_description"].removeprefix("file: ") in copied
    assert setup["metadata"]["license_files"] in copied
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for source in copied:
        assert (ROOT / source).exists()
        assert source in kept
    (major, minor) = re.search(r"python:(\d+)\.(\d+)-slim", text).groups()
    assert (3, 11) <= (int(major), int(minor)) < (3, 14)
