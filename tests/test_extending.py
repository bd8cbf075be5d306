"""docs/extending.md: every example on the page is added to a copy of the package, and used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def new_files(text):
    """{path: content} of the Python files of a section."""
    return {path: f"{body}\n" for path, body in re.findall(r"```python\n# (\S+)\n(.*?)\n```", text, re.DOTALL)}


def changes(text):
    """{path: [(line, added lines behind it)]} of a section."""
    found = {}
    for path, body in re.findall(r"```diff\n--- (\S+)\n(.*?)\n```", text, re.DOTALL):
        hunks = found[path] = []
        for line in body.splitlines():
            if line.startswith("+"):
                hunks[-1][1].append(line[1:])
            else:
                hunks.append((line[1:], []))
    return found


@pytest.mark.parametrize("title", SECTIONS)
def test_adding_is_one_file_and_one_row(title):
    files, touched = new_files(SECTIONS[title]), changes(SECTIONS[title])
    assert len(files) == len(touched) == 1
    assert not (ROOT / next(iter(files))).exists()
    (hunks,) = touched.values()
    # The import and the row, which a comma ends.
    (_, imported), (_, row) = hunks
    assert len(imported) == 1
    assert imported[0].startswith("from sddit_jax.")
    assert "\n".join(row).endswith(",")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with all the examples, and a function that runs its commands."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "sddit_jax", folder / "sddit_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for text in SECTIONS.values():
        for path, content in new_files(text).items():
            (folder / path).write_text(content)
        for path, hunks in changes(text).items():
            lines = (folder / path).read_text().splitlines()
            for line, added in hunks:
                assert lines.count(line) == 1, f"{path}: {line!r}"
                at = lines.index(line) + 1
                lines[at:at] = added
            (folder / path).write_text("\n".join(lines) + "\n")

    def command(name, *arguments):
        environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-m", f"sddit_jax.{name}", *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    return folder, command


def test_all_of_them_at_work(extended):
    folder, command = extended
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(folder / "digits.npz", arr_0=images, arr_1=digits.target)
    command(
        "main", f"--config={ROOT}/tests/configs/tiny.py", "--workdir=run",
        "--config.data.source=pairs:digits.npz", "--config.sampling.solver=midpoint", "--config.diffusion.name=flow",
        "--config.objectives.clean_patches.weight=0.5", "--config.objectives.clean_patches.block=1",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/clean_patches"] for row in rows if "train/clean_patches" in row]
    assert losses[-1] < losses[0]
    assert [row["step"] for row in rows if "eval/weights_norm" in row] == [10, 20, 30, 40, 50, 60]
    command("sample", "--workdir=run", "--output=out", "--num_samples=64", "--solver=midpoint")
    record = json.loads((folder / "out" / "samples.json").read_text())
    assert record["sampler"]["name"] == "midpoint"
    command("evaluate", "--source=digits", "--features=histogram", "--write_reference=ref.npz")
    command("evaluate", "--samples=out/samples.npz", "--reference=ref.npz", "--features=histogram")
    results = json.loads((folder / "out" / "samples.evaluation.json").read_text())["results"]
    assert {"fd_histogram", "energy"} <= results.keys()
    assert results["energy"] > 0
    command("convert", "to-torch", "--workdir=run", "--output=model.safetensors")
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"encoder", "decoder"}  # noqa: SIM118
