"""What all commands share: flags, log lines, and errors as one message and an exit code."""

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
    """Parses the flags, runs the command and exits: 0 done, 2 the user's mistake, 3 diverged, 75 interrupted.

    The command gets up to `words` arguments that are not flags.
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
    """Parses flags, a config file's too, and returns at most `words` other arguments.

    Raises UserError for what absl and ml_collections refuse.
    """
    if {"-h", "--help"} & set(argv):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the flags") from error
    except (AttributeError, KeyError) as error:
        # ml_collections' answer to a key that a locked config lacks; others are bugs in the file, and stay as they are.
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        keys = [match[1] for argument in argv if (match := re.match(r"--?config\.([\w.]+)", argument))]
        unknown = next((words for key in keys if (words := border.unknown_key(key))), f"unknown config key: {error}")
        raise ConfigError(unknown) from error
    if len(rest) > words:
        raise UserError(f"unexpected arguments {' '.join(rest[words:])}; flags are written --name=value")
    return rest
