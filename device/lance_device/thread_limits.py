"""How many threads may be asked for; light, because the command line is parsed before libraries are loaded."""

import os

# Of a run that another machine began: its checkpoint is a file like any other.
MOST_STORED = 256
# More threads than cores only wait for each other; four times as many leave room to measure that.  Each graph
# starts its own, and where one cannot be started, onnxruntime 1.31 waits for ever, deaf to signals.
TIMES_CORES = 4


def most_threads() -> int:
    """Threads that a command accepts on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(TIMES_CORES * cores, MOST_STORED)
