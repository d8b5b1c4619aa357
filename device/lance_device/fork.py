"""A measurement in a fork of this process: it may fail, be killed or hang, and leaves nothing behind."""

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from lance_device.guard import status_bytes
from lance_device.session import is_lack_of_memory
from lance_edge import errors
from lance_edge.errors import LanceError, PlatformError

FAILED = "failed"
RESIDENT, ADDRESS_SPACE = "VmHWM", "VmPeak"  # peaks of memory, as in proc(5)
TRIAL_TIMEOUT_S = 900.0  # a few images take seconds on a slow board; by layer, a whole batch takes a minute


def in_a_fork(measure: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `measure` gives in a copy of this process; what it had reached (`lack`) if memory did not suffice.

    Raises:
        LanceError: what `measure` raised, but for a lack of memory; `PlatformError` if it takes too long.
        RuntimeError: with the traceback, if it raised anything else.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(measure, readable, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        is_ready, _, _ = select.select([pipe], [], [], TRIAL_TIMEOUT_S)
        if not is_ready:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(child, 0)
    if not is_ready:
        raise PlatformError(
            f"measuring how much memory a step takes has not ended after {TRIAL_TIMEOUT_S:g} s; try again"
            " when the board has less to do, or train without a limit"
        )
    if not answer:  # killed, or ended by a library: it took more memory than there was
        return lack()
    found = json.loads(answer)
    if isinstance(found, str):
        kind, text = found.split(":", 1)
        raise getattr(errors, kind, RuntimeError)(text)
    return dict(found)


def _answer(measure: Callable[[], dict[str, int]], readable: int, writable: int) -> NoReturn:
    """In the fork: answer as JSON, and end without a trace of this process's own ending."""
    found: Any = None
    try:
        os.close(readable)
        found = measure()
    except (MemoryError, PlatformError):
        found = lack()
    except LanceError as error:
        found = f"{type(error).__name__}:{error}"
    except Exception as error:
        is_lack = is_lack_of_memory(error)
        found = lack() if is_lack else f"RuntimeError:{traceback.format_exc()}"
    finally:
        os.write(writable, json.dumps(found).encode() if found is not None else b"")
        os._exit(0)


def lack(more_bytes: int = 0) -> dict[str, int]:
    """That memory did not suffice, and what this process takes by now: the run takes at least as much.

    Args:
        more_bytes: of address space that it was about to take.
    """
    taken = {kind: status_bytes(kind) or 0 for kind in (RESIDENT, ADDRESS_SPACE)}
    return {FAILED: 1, **taken, ADDRESS_SPACE: taken[ADDRESS_SPACE] + more_bytes}
