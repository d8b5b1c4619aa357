"""The engine: ONNX Runtime sessions, fed and fetched by tensor name.

This is the only module that imports onnxruntime, and it does so late: `require_runtime` first says in
one line what is wrong on a machine that has no wheel of it.
"""

import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_device.lanes import side_by_side
from lance_edge.errors import ArtifactError, Interrupted, PlatformError
from lance_edge.graph_check import check_graph
from lance_edge.manifest import TensorSpec, batch_multiple
from lance_edge.names import BATCH_DIM

Array = NDArray[Any]

# Chosen for little memory and no wasted power on a board; recorded in run.json.
SESSION_OPTIONS: dict[str, Any] = {
    # Micro-batches are small and all alike, so an arena stays small and saves the system's page faults: the
    # prefix took a quarter less time, and the peak was 3 MiB lower (MCUNet, 2 cores).
    "enable_cpu_mem_arena": True,
    "enable_mem_pattern": False,  # patterns are per input shape; the last micro-batch may be shorter
    "inter_op_num_threads": 1,
    "log_severity_level": 3,  # errors only
}
SESSION_CONFIG: dict[str, str] = {
    # Idle threads sleep: a step has several graphs, each with threads of its own, and spinning ones take the
    # cores from those that work (twice the time on 2 cores).
    "session.intra_op.allow_spinning": "0",
    "session.load_model_format": "ONNX",  # what graph_check has looked at, and not what else the bytes may be
}


def require_runtime() -> None:
    """Check that this machine can run ONNX Runtime, before anything imports it.

    Raises:
        PlatformError: on a 32-bit system, or where onnxruntime is not installed.
    """
    machine = platform.machine()
    if sys.maxsize < 2**32:
        raise PlatformError(
            f"this is a 32-bit Python on {machine}: there is no onnxruntime wheel for 32-bit ARM;"
            " install a 64-bit OS (Raspberry Pi OS 64-bit) and lance-edge in its Python"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise PlatformError(
            f"onnxruntime is not installed in {sys.executable} (Python {platform.python_version()}, {machine});"
            " install it with: pip install onnxruntime"
            " (on ARM it has wheels for a 64-bit OS with CPython 3.11 or newer only)"
        )


def runtime_version() -> str:
    """The version of ONNX Runtime in use."""
    return str(_runtime().__version__)


def _runtime() -> ModuleType:
    require_runtime()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read at import; Linux wheels since 1.29 report home otherwise
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise PlatformError(
            f"onnxruntime is installed but does not load here ({error}); reinstall it for this Python and OS"
        ) from None
    return onnxruntime  # type: ignore[no-any-return]


@functools.cache
def _run_options() -> Any:
    """Of all runs of all graphs."""
    return _runtime().RunOptions()


def interrupt_graphs(is_wanted: bool) -> None:
    """Make graphs that run, and those that are to run, end with `Interrupted`; may come from any thread."""
    _run_options().terminate = is_wanted


class Graph:
    """One ONNX graph, ready to run."""

    def __init__(
        self,
        model: bytes,
        where: str,
        threads: int,
        specs: Mapping[str, TensorSpec] = MappingProxyType({}),
        lanes: int = 1,
    ) -> None:
        """Load.

        Args:
            model: the serialised graph.
            where: how messages call it, `pkg.tar: graphs/prefix.onnx`.
            threads: to use.
            specs: what inputs and outputs are like; an output that is not like that is refused.
            lanes: how many runs `run_each` has at a time, which share the threads.

        Raises:
            ArtifactError: if it is no graph that lance-edge runs, or ONNX Runtime cannot load it.
        """
        check_graph(model, where)
        runtime = _runtime()
        self._where, self._specs, self.lanes = where, dict(specs), lanes
        try:
            self._session = runtime.InferenceSession(
                model,
                sess_options=_session_options(runtime, max(1, threads // lanes)),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print, and try the same again
            )
        except Exception as error:  # onnxruntime's own exceptions have no common base
            if is_lack_of_memory(error):
                raise _out_of_memory(where, error) from None
            raise ArtifactError(
                f"{where}: onnxruntime {runtime.__version__} cannot load this graph ({_one_line(error)});"
                " rebuild the file with lance-host, or install a newer onnxruntime"
            ) from None
        self.inputs = tuple(tensor.name for tensor in self._session.get_inputs())
        self.outputs = tuple(tensor.name for tensor in self._session.get_outputs())
        tensors = (*self._session.get_inputs(), *self._session.get_outputs())
        self.batch_axes = {tensor.name: _batch_axis(tensor.shape) for tensor in tensors}

    def expect(self, *specs: TensorSpec) -> None:
        """What some inputs and outputs are like, where that is known only now."""
        self._specs |= {spec.name: spec for spec in specs}

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own key-value pairs."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, values: Mapping[str, Array], only: Sequence[str] = ()) -> dict[str, Array]:
        """All outputs by name; takes from `values` exactly the declared inputs.

        Args:
            only: these outputs, if not all are wanted.

        Raises:
            ArtifactError: if an input is missing or does not fit.
            Interrupted: if `interrupt_graphs` was called.
            PlatformError: if memory does not suffice.
        """
        missing = [name for name in self.inputs if name not in values]
        if missing:
            raise ArtifactError(
                f"{self._where}: input {missing[0]!r} is provided by no graph and no array of the package;"
                " rebuild it with lance-host"
            )
        feeds = {name: values[name] for name in self.inputs}
        try:
            names = only or self.outputs
            outputs = dict(zip(names, self._fetch(feeds, names), strict=True))
        except Exception as error:
            if _run_options().terminate:
                raise Interrupted("stopped on request") from None
            if is_lack_of_memory(error):
                raise _out_of_memory(self._where, error) from None
            raise ArtifactError(
                f"{self._where}: onnxruntime cannot run this graph ({_one_line(error)});"
                " rebuild it with lance-host"
            ) from None
        self._check_outputs(feeds, outputs)
        return outputs

    def run_each(self, parts: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """`run` of each of them, in lanes; the outputs in their order."""
        return side_by_side(self.lanes, self.run, parts)

    def _check_outputs(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """What comes out is what the package declares, so that whoever computes with it can rely on that."""
        dims: dict[str, int] = {}
        for values in (feeds, outputs):
            for name, value in values.items():
                if name in self._specs and not fits(value, self._specs[name], dims):
                    raise ArtifactError(
                        f"{self._where}: {name} is {_kind(value)}, expected {self._specs[name].dtype}"
                        f" {[dims.get(str(dim), dim) for dim in self._specs[name].shape]};"
                        " rebuild the package with lance-host"
                    )

    def _fetch(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        return self._session.run(list(names), dict(feeds), _run_options())  # type: ignore[no-any-return]


def fits(value: Array, spec: TensorSpec, dims: dict[str, int]) -> bool:
    """Whether an array is like that.

    Args:
        dims: sizes of named dimensions (`"N"`); a name is what it is in the first array that has it, and
            `"4*N"` is four times what `"N"` is.
    """
    if not isinstance(value, np.ndarray) or str(value.dtype) != spec.dtype or value.ndim != len(spec.shape):
        return False
    return all(_agrees(size, dim, dims) for size, dim in zip(value.shape, spec.shape, strict=True))


def _agrees(size: int, dim: int | str, dims: dict[str, int]) -> bool:
    if isinstance(dim, int):
        return size == dim
    multiple = batch_multiple(dim)
    if multiple is None:
        return size == dims.setdefault(dim, size)
    samples, rest = divmod(size, max(multiple, 1))
    return rest == 0 and samples == dims.setdefault(BATCH_DIM, samples)


def _kind(value: Array) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _batch_axis(shape: Sequence[int | str | None]) -> int | None:
    """The axis of the samples: the dimension called N."""
    return list(shape).index(BATCH_DIM) if BATCH_DIM in shape else None


def _session_options(runtime: ModuleType, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in SESSION_OPTIONS.items():
        setattr(options, name, value)
    for key, text in SESSION_CONFIG.items():
        options.add_session_config_entry(key, text)
    return options


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an exception of onnxruntime says that memory, or room for a thread, was lacking."""
    text = str(error).lower()
    signs = ("bad_alloc", "bad allocation", "failed to allocate", "posixthread", "pthread", "new thread")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def _out_of_memory(where: str, error: Exception) -> PlatformError:
    return PlatformError(
        f"{where}: not enough memory ({_one_line(error)}); close other programs or use a smaller --micro-batch"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
