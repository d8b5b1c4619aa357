"""Errors that a user can act on.

Every message says where, what was expected, what was found and what to do.  Libraries raise these;
only the command-line modules print them (one line on stderr) and turn them into an exit code.
"""


class LanceError(Exception):
    """Base of every expected failure.  `exit_code` is what the command line exits with.

    Attributes:
        reason: what is wrong, in a few words, for a list or another message; by default all of it.
    """

    exit_code = 1

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class OptionError(LanceError):
    """A value of a command-line option that is of no use."""

    exit_code = 2


class ArtifactError(LanceError):
    """A package (`pkg.tar`) that is damaged, unsafe, or of a schema this version does not read."""

    exit_code = 3


class CheckpointError(LanceError):
    """A checkpoint that is damaged or belongs to another package."""

    exit_code = 4


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose content is not what was written: an older one may still be whole."""


class DataError(LanceError):
    """Images or class folders that cannot be used as given."""

    exit_code = 5


class ModelError(LanceError):
    """A network, or weights of a network, that cannot be used as given."""

    exit_code = 6


class NumericalError(LanceError):
    """Training produced a value that is not a number."""

    exit_code = 7


class StorageError(LanceError):
    """A file could not be written: disk full, no permission, read-only card."""

    exit_code = 8


class PlatformError(LanceError):
    """What was asked for cannot run on this machine."""

    exit_code = 9


class Interrupted(LanceError):  # noqa: N818 - a stop on request is no error
    """Stopped on request (Ctrl-C or SIGTERM) with the last complete step kept."""

    exit_code = 130
