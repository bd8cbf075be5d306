"""The config reference: docs/config.md, --help_config, and keys at the wrong level."""

import json
import logging
from pathlib import Path

import pytest

from sddit_jax.config.border import flatten, resolve, to_dict
from sddit_jax.config.reference import declared, help_text, page
from sddit_jax.config.schema import Config
from sddit_jax.errors import CheckpointError, UserError
from sddit_jax.runs.start import check_identity

ROOT = Path(__file__).parents[2]
DIGITS = "configs/digits.py"


def test_the_page_is_what_the_declarations_say():
    renewed = "docs/config.md is stale; renew it by: python -m sddit_jax.config.reference > docs/config.md"
    assert (ROOT / "docs" / "config.md").read_text() == page(), renewed


def test_every_key_is_declared_once_with_a_meaning_that_fits_its_table():
    keys = list(declared())
    assert sorted(key.name for key in keys) == sorted(flatten(Config()))
    for key in keys:
        assert key.meaning[0].islower() or not key.meaning[0].isalpha(), key
        assert not key.meaning.endswith("."), key
        assert "|" not in key.meaning + key.values, key
        assert key.about.endswith("."), key


def test_keys_are_found_by_name_and_meaning_and_printed_with_all_that_is_declared():
    text = help_text("LEARNING")
    assert "optimizer.learning_rate: 0.0001 [I]\n    peak learning rate" in text
    assert "    Values: float, above 0. Resume: warns.\n" in text
    # Its meaning alone has the word.
    assert "optimizer.schedule: constant [I]\n" in text
    assert "Values: constant, cosine. " in text
    assert "model.depth" not in text
    assert "objectives.discrimination.teacher_momentum: 0.996,1.0 [C]" in help_text("momentum")
    assert "Values: 2 floats, at least 0, at most 1. " in help_text("teacher_momentum")
    assert 'log.wandb: "" [C]' in help_text("wandb")


def test_without_a_text_all_keys_are_printed():
    lines = help_text("").splitlines()
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in flatten(Config()))


def test_a_config_adds_its_own_values():
    text = help_text("learning", resolve({"optimizer": {"learning_rate": 0.01}}))
    assert "optimizer.learning_rate: 0.0001 [I], in this config 0.01\n" in text
    assert text.count("in this config") == 1


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("lerning_rate", "similar keys: optimizer.learning_rate"), ("qqq", "--help_config= prints all keys")],
)
def test_a_text_that_no_key_has_is_answered_with_similar_keys(pattern, said):
    with pytest.raises(UserError, match=rf"^--help_config={pattern}: no key has .*; {said}$"):
        help_text(pattern)


@pytest.mark.parametrize(
    ("changes", "resume"),
    [
        ({"sampling": {"steps": 7}}, "yes"),
        ({"model": {"scan": False}}, "yes"),
        ({"steps": 7}, "warns"),
        ({"masking": {"ratio": 0.3}}, "warns"),
        ({"model": {"depth": 7}}, "no"),
    ],
)
def test_resume_is_what_a_continued_run_does(tmp_path, caplog, changes, resume):
    ((section, value),) = changes.items()
    name = f"{section}.{next(iter(value))}" if isinstance(value, dict) else section
    assert next(key.resume for key in declared() if key.name == name) == resume
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    if resume == "no":
        with pytest.raises(CheckpointError, match=name):
            check_identity(tmp_path, resolve(changes))
        return
    with caplog.at_level(logging.WARNING, "sddit_jax"):
        check_identity(tmp_path, resolve(changes))
    assert (name in caplog.text) == (resume == "warns")


def test_help_config_needs_no_run(command):
    done = command("main", "--help_config=learning")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == help_text("learning")
    done = command("main", "--help_config=learning", f"--config={DIGITS}")
    assert "optimizer.learning_rate: 0.0001 [I], in this config 0.002\n" in done.stdout
    done = command("main", "--help_config=lerning_rate")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--help_config" in command("main", "--help").stdout


# What a user may write for optimizer.learning_rate, and what is said of it.
UNKNOWN, MEANT = "unknown config key {}: did you mean optimizer.learning_rate?", "did you mean --config.optimizer.{}?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([DIGITS, "--config.learning_rate=1"], UNKNOWN.format("learning_rate")),
        ([DIGITS, "--config.optimiser.learning_rate=1"], UNKNOWN.format("optimiser.learning_rate")),
        ([DIGITS, "--config.model.lerning_rate", "1"], UNKNOWN.format("model.lerning_rate")),
        ([DIGITS, "--noconfig.learning_rate"], UNKNOWN.format("learning_rate")),
        ([DIGITS, "--learning_rate=1"], MEANT.format("learning_rate")),
        ([f"{DIGITS}:learning_rate=1"], MEANT.format("learning_rate=1")),
        ([f"{DIGITS}:method=dit,config.optimizer.learning_rate=1"], MEANT.format("learning_rate=1")),
    ],
)
def test_a_key_at_the_wrong_level_of_a_command_is_found(command, arguments, said):
    done = command("main", f"--config={arguments[0]}", *arguments[1:], "--workdir=none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.learning_rate = 1", UNKNOWN.format("learning_rate")),
        ("config.model.learning_rate = 1", UNKNOWN.format("learning_rate")),
        ("config.lerning_rate = 1", UNKNOWN.format("lerning_rate")),
        ("config.optimiser.learning_rate = 1", "unknown config key optimiser: did you mean optimizer?"),
        ("config.update_from_flattened_dict({'model.learning_rate': 1})", UNKNOWN.format("learning_rate")),
        ("config.unlock().model.learning_rate = 1", UNKNOWN.format("model.learning_rate")),
    ],
)
def test_a_key_at_the_wrong_level_of_a_config_file_is_found(command, tmp_path, line, said):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sddit_jax.config.presets import default_config\n\n\n"
        f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
    )
    done = command("main", f"--config={file}", "--workdir=none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
