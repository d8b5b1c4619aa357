"""Letting other programs go first; light, because it is called before any library is loaded."""

import os

from lance_edge.errors import PlatformError


def be_nice(nice: int | None) -> None:
    """Set the niceness of this thread, and so of all that it starts later; `None` leaves it.

    On Linux every thread has its own, so this comes before numpy and onnxruntime start theirs.

    Raises:
        PlatformError: if the system does not permit it: only root takes a lower one than it has.
    """
    if nice is None:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except OSError as error:
        has = os.getpriority(os.PRIO_PROCESS, 0)
        raise PlatformError(
            f"--nice {nice}: not permitted ({error.strerror}), as this process has {has}; give {has} or more,"
            " or leave the option out"
        ) from None
