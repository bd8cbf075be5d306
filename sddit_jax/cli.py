"""What all commands share: parsing flags, printing log lines, and ending with one message and an exit code."""

import logging
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import absl.logging
from absl import flags

from sddit_jax.config import border
from sddit_jax.errors import CommandError, ConfigError, Interrupted, UserError
from sddit_jax.parallel import distributed


def run(command: Callable[..., None], words: int = 0) -> NoReturn:
    """Parses the flags, calls the command with up to `words` arguments that are not flags, and exits.

    Exit codes: 0 done, 2 the user's mistake, 3 the run diverged, 75 interrupted, 1 any other exception.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    log = logging.getLogger("sddit_jax")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    exit_code = 1
    try:
        command(*parse_flags(sys.argv, words))
        exit_code = 0
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_code = error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what was saved before is intact", file=sys.stderr)
        exit_code = Interrupted.exit_code
    finally:
        if exit_code:
            distributed.leave(exit_code)
    sys.exit(exit_code)


def parse_flags(argv: list[str], words: int = 0) -> list[str]:
    """Parses all flags, those of --config too, and returns the other arguments.

    Raises UserError if absl or ml_collections refuses a flag, or if there are more than `words` other arguments.
    """
    if {"-h", "--help"} & set(argv):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        is_key = isinstance(error, flags.UnrecognizedFlagError) and "config" in flags.FLAGS
        keys = " or ".join(f"--config.{key}" for key in border.keys_named(error.flagname)[:4]) if is_key else ""
        raise UserError(f"{error}; {f'did you mean {keys}? ' if keys else ''}--help lists the flags") from error
    except (AttributeError, KeyError) as error:
        # ml_collections raises these for a key that a locked config lacks, and quotes the key without its sections. If
        # the config file's own code raised the error, the file has a bug, and the traceback shows it.
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        keys = [match[1] for argument in argv if (match := re.match(r"--?config\.([\w.]+)", argument))]
        keys += re.findall(r"[\"'\\]([\w.]+)[\"'\\]", str(error.args[0]))[:1]
        unknown = next((words for key in keys if (words := border.unknown_key(key))), f"unknown config key: {error}")
        raise ConfigError(unknown) from error
    if len(rest) > words:
        raise UserError(f"unexpected arguments {' '.join(rest[words:])}; flags are written --name=value")
    return rest
