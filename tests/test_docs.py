"""README.md and docs/*.md: commands run at tiny size or are parsed, examples in Python run, links lead somewhere.

pytest -s tests/test_docs.py -k parse   prints the commands that are only parsed.
"""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# test_extending.py uses its examples.
EXTENDING = "docs/extending.md"
FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
KINDS = ("bash", "bash parsed", "python", "python parsed", "text", "diff", "bibtex")

# Stands behind what a page gives to main. With one learning rate and one EMA, a run and its fine-tuning compile the
# same programs.
TINY = {
    "steps": 4, "batch_size": 8, "model.depth": 1, "model.width": 16, "model.heads": 2, "model.decoder_depth": 1,
    "model.decoder_width": 16, "model.decoder_heads": 2, "objectives.discrimination.prototypes": 8,
    "objectives.discrimination.head_width": 16, "objectives.discrimination.bottleneck": 8,
    "optimizer.learning_rate": 1e-3, "ema.warmup": True, "checkpoint.every": 2, "sampling.steps": 2,
    "sampling.every": 4, "sampling.grid": 10, "log.every": 1, "log.diagnose_every": 0, "eval.name": "none",
}  # fmt: skip
# These take most of the time.
SLOW = [f"docs/{name}.md" for name in ("fine-tuning", "first-run", "probes", "pytorch", "sampling", "training")]
# Run by the shell where a block is run.
SHELL = ("ls", "cp", "mkdir", "cat", "head", "for")
# Not checked where a block is parsed, apart from a `python -m sddit_jax.NAME` that they are given.
UNCHECKED = ("pip", "git", "docker", "sbatch", "gcloud", "kubectl", "ls", "pytest", ".ci/run", "export")


def read(page):
    return (ROOT / page).read_text()


def blocks(page, *kinds):
    return [(kind, content) for _, kind, content in FENCE.findall(read(page)) if kind in kinds]


def lines(page, *kinds):
    """(kind of the block, line) of a page's commands, whole and without lines of comments."""
    for kind, content in blocks(page, *kinds):
        for line in content.replace("\\\n", " ").splitlines():
            if not re.match(r"\s*(#|$)", line):
                yield kind, line


def commands_of(line):
    """The words of a line's commands, without comments, redirections and variables that are set for a command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    operator, found = "", []
    for is_operator, words in itertools.groupby(lexer, key=lambda word: set(word) <= set("();<>|&")):
        if is_operator:
            operator = "".join(words)
        elif not {"<", ">"} & set(operator):
            found.append(list(itertools.dropwhile(re.compile(r"\w+=").match, words)))
    return [words for words in found if words]


def clone(folder):
    """`folder`, with what a clone has and with photographs."""
    for name in ("configs", "tests", "benchmarks", "docs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name, i in itertools.product(("cats", "dogs"), range(20)):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        image.save(folder / "photos" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def train(command, tmp_path_factory):
    """train(arguments, folder) is command("main", *arguments, cwd=folder) at tiny size.

    Pages begin with the same runs. A run that starts from nothing is kept, and copied when it is asked for again.
    """
    kept = {}

    def run(arguments, folder):
        words = " ".join(arguments)
        workdir = folder / re.search(r"--workdir=(\S+)", words)[1]
        new = not workdir.exists()
        if new and words in kept:
            shutil.copytree(kept[words], workdir)
            return subprocess.CompletedProcess(arguments, 0)
        keys = {**TINY, **({"model.image_size": 16} if "configs/folder.py" in words else {})}
        done = command("main", *arguments, *(f"--config.{key}={value}" for key, value in keys.items()), cwd=folder)
        if new and not done.returncode:
            kept[words] = shutil.copytree(workdir, tmp_path_factory.mktemp("kept") / "run")
        return done

    return run


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if page != EXTENDING and blocks(page, "bash", "python")
    ],
)
def test_blocks_run(page, command, train, tmp_path):
    folder = clone(tmp_path)
    for _, line in lines(page, "bash"):
        (words, *more) = commands_of(line)
        if " ".join(words).startswith("python -m sddit_jax.") and not more:
            _, _, name, *arguments = words
            if name == "sddit_jax.main" and "--workdir=" in line:
                done = train(arguments, folder)
            else:
                done = command(name.removeprefix("sddit_jax."), *arguments, cwd=folder)
        else:
            assert words[0] in SHELL, f"{line}: only `python -m sddit_jax.NAME` and {', '.join(SHELL)} are run"
            done = subprocess.run(["bash", "-ec", line], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    if code := "\n".join(content for _, content in blocks(page, "python")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment() | {"PYTHONPATH": str(ROOT)}, cwd=folder,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def python_commands(words):
    """The arguments of each `python` that a command runs, on whatever machine. Scripts of launch/ run dry.

    Raises ValueError for a program that is not known, and for what a script of launch/ refuses.
    """
    split = words.index("--") if "--" in words else len(words)
    own, given = words[:split], words[split + 1 :]
    if words[0] in ("launch/tpu.sh", "launch/gke.sh") or words[:2] == ["python", "launch/local.py"]:
        trial = [*own, "--dry_run", *words[split:]]
        done = subprocess.run(trial, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr)
        if words[0] == "python":
            return python_commands(given)
        return [["-m", "sddit_jax.main", *given]] if given else []
    if words[0] == "launch/restart.sh":
        for flag in itertools.takewhile(lambda word: word.startswith("--"), words[1:]):
            if f"{flag.partition('=')[0]}=*)" not in read(words[0]):
                raise ValueError(f"{words[0]} has no {flag}")
    elif words[0] not in ("python", *UNCHECKED):
        raise ValueError(f"{words[0]} is not in UNCHECKED")
    if "launch/slurm.sh" in words:
        return [["-m", "sddit_jax.main", *words[words.index("launch/slurm.sh") + 1 :]]]
    return [words[words.index("python") + 1 :]] if "python" in words else []


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """{page: the messages about its commands}, from one process for all pages (command_lines.py)."""
    messages, requests, asked = {page: [] for page in PAGES}, [], []
    for page in PAGES:
        folder = clone(tmp_path_factory.mktemp("parsed"))
        for kind, line in lines(page, "bash", "bash parsed"):
            try:
                for words in commands_of(line):
                    if kind == "bash parsed" or words[0] == "python":
                        for arguments in python_commands(words):
                            requests.append([str(folder), arguments])
                            asked.append((page, line))
            except ValueError as error:
                messages[page].append(f"{line}\n{error}")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "command_lines.py"], input=json.dumps(requests), stdout=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": str(ROOT)}, text=True, check=True,
    )  # fmt: skip
    for (page, line), message in zip(asked, json.loads(done.stdout), strict=True):
        if message:
            messages[page].append(f"{line}\n{message}")
    return messages


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, wrong):
    for _, line in lines(page, "bash parsed"):
        print(f"{page} only parsed: {' '.join(line.split())}")
    assert not wrong[page], "\n".join(wrong[page])


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    assert read(page).count("```") == 2 * len(FENCE.findall(read(page)))
    assert {kind for _, kind, _ in FENCE.findall(read(page))} <= set(KINDS) - ({"diff"} if page != EXTENDING else set())
    for _, content in blocks(page, "python", "python parsed"):
        compile(content, page, "exec")


def links(page):
    """What a page links to outside its blocks and outside code, without addresses of the web."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)|\b(?:src|srcset|href)=\"([^\"]+)\"", prose)
    return [link for pair in found for link in pair if link and not re.match(r"\w+:", link)]


def anchors(page):
    """GitHub's names of a page's headings."""
    found = []
    for heading in re.findall(r"^#+ +(.*)", FENCE.sub("", read(page)), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        same = [other for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other)]
        found.append(f"{name}-{len(same)}" if same else name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_is_short_and_the_index_is_complete():
    assert len(read("README.md").splitlines()) <= 160
    assert {f"docs/{link}" for link in links("docs/index.md")} >= set(PAGES) - {"README.md", "docs/index.md"}
