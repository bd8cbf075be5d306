"""The errors that a user can meet, each with the exit code of a command that ends with it."""


class CommandError(Exception):
    """Ends a command with one message. A launcher reads `exit_code` to decide whether to start the command again."""

    exit_code = 2


class UserError(CommandError):
    """The user's mistake; the message names the wrong value and a right one. Exit code 2."""


class ConfigError(UserError):
    """A config that cannot run: an unknown key, a value of a wrong type, or values that exclude each other."""


class DataError(UserError):
    """A dataset that cannot be read."""


class WeightsError(UserError):
    """A file of weights that cannot be loaded."""


class CheckpointError(UserError):
    """A workdir from which a run cannot continue, or to which it cannot write."""


class Diverged(CommandError):
    """The loss or the gradients stayed non-finite; a second start would end the same. Exit code 3."""

    exit_code = 3


class Interrupted(CommandError):
    """A signal stopped the command after it had saved; the same command continues. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class Unreachable(CommandError):
    """Other processes of this run did not come in time; a later start may find them. Exit code 75."""

    exit_code = 75
