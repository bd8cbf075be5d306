"""The errors that a user can meet, each with the exit code that the commands end with."""


class CommandError(Exception):
    """An end of a command that is explained in one message; `exit_code` tells a launcher what to do."""

    exit_code = 2


class UserError(CommandError):
    """The user's mistake: the message names the value and what would be right. Exit code 2."""


class ConfigError(UserError):
    """A configuration that cannot be run: an unknown key, a wrong type, an impossible combination."""


class DataError(UserError):
    """A dataset that cannot be read."""


class WeightsError(UserError):
    """A file of weights that cannot be loaded."""


class CheckpointError(UserError):
    """A working directory that cannot be continued from or written to."""


class Diverged(CommandError):
    """The loss or the gradients stayed non-finite. Starting again would diverge again. Exit code 3."""

    exit_code = 3


class Interrupted(CommandError):
    """Stopped by a signal after saving; starting again continues the run. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class Unreachable(CommandError):
    """Other processes of the same run did not come in time; they may be on their way. Exit code 75, as Interrupted."""

    exit_code = Interrupted.exit_code
