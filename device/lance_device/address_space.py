"""A limit on address space (`ulimit -v`): looked at before any library is loaded, which needs some itself."""

import contextlib
import ctypes
import os
import resource

from lance_edge.errors import PlatformError

M_ARENA_MAX = -8  # malloc.h
# Address space that Python with numpy, pillow and onnxruntime 1.31 takes on x86-64 before any network: 155 MiB,
# with one thread for numpy's BLAS.
LEAST_ADDRESS_SPACE = 176 << 20
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
BLAS_THREAD_BYTES = 32 << 20  # OpenBLAS reserves a buffer of this size for each thread, beside its stack


def expect_address_space() -> None:
    """See that a limit on address space (`ulimit -v`) leaves room to load the libraries at all, and save some.

    glibc reserves 64 MiB of address space for every thread that allocates; one heap for all is enough here.
    OpenBLAS starts a thread a core when numpy loads, 40 MiB each, and ends the process where they do not fit;
    it starts more when a method asks for them (`step.training_step`), and by then there is a plan.

    Raises:
        PlatformError: if not; they would fail to load in many ways, some of them without a word.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    if limit < LEAST_ADDRESS_SPACE:
        raise PlatformError(
            f"ulimit -v is {limit >> 20} MiB, but Python with numpy and onnxruntime needs"
            f" {LEAST_ADDRESS_SPACE >> 20} MiB of address space before any network; allow it more"
        )
    os.environ.setdefault(BLAS_THREADS, "1")
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
