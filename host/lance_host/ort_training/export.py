"""`lance-host export-ort`: the four files that ONNX Runtime's training API reads."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onnx import numpy_helper

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import trained_shapes
from lance_edge.errors import DataError, LanceError, ModelError, PlatformError, StorageError
from lance_edge.manifest import Variant
from lance_edge.names import DROPOUT_SEEDS, WEIGHTS_MEMBER
from lance_host.graph_file import read_graph
from lance_host.ort_training import write_checkpoint
from lance_host.ort_training.models import OPTIMIZERS, evaluation_model, optimizer_model, training_model

ARTIFACTS = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
LIMIT_S = 300.0  # importing PyTorch from a slow disk
# Versions that work together: a newer onnx writes what the library does not read, and it imports PyTorch.
INSTALL = "pip install onnxruntime-training==1.19.2 onnx==1.17.0 torch==2.13.0"


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        layers: number of trained layers, where the package holds several.
        optimizer: a name of `OPTIMIZERS`.
        clip: largest norm of the gradient; 0 leaves it as it is.
        python: the interpreter that has onnxruntime-training.
    """

    artifact: Path
    method: str
    output: Path
    layers: int | None = None
    optimizer: str = "sgd"
    clip: float = 0.0
    python: str = sys.executable


def export_artifacts(request: Request) -> int | None:
    """Write the artifacts, which the library has loaded once.

    Returns:
        the number of images that a training step must be fed, `None` where it may be any.

    Raises:
        LanceError: with nothing written.
    """
    _check(request)
    with tempfile.TemporaryDirectory(prefix="lance-ort-") as name, Bundle(request.artifact) as bundle:
        folder = Path(name)
        variant = bundle.manifest.variant(request.method, request.layers)
        _refuse_dropout(bundle, variant)
        models = {
            "training_model.onnx": training_model(bundle, variant),
            "eval_model.onnx": evaluation_model(bundle, variant),
            "optimizer_model.onnx": optimizer_model(request.optimizer, request.clip),
        }
        for file, model in models.items():
            (folder / file).write_bytes(model.SerializeToString(deterministic=True))
        _write_parameters(bundle, variant, folder / "parameters")
        _let_the_library_write(folder, request.python)
        _publish(folder, request.output)
    return bundle.manifest.batch_size if variant.batch_projections else None


def _check(request: Request) -> None:
    if request.optimizer not in OPTIMIZERS:
        raise LanceError(f"--optimizer: expected {' or '.join(OPTIMIZERS)}, found {request.optimizer}")
    if not 0 <= request.clip < float("inf"):
        raise LanceError(f"--clip: expected a norm, or 0 for none, found {request.clip}")
    if request.output.exists() and not request.output.is_dir():
        raise StorageError(f"{request.output}: expected a folder to write to, found a file; name another one")
    if request.output.is_dir() and any(request.output.iterdir()):
        raise DataError(
            f"{request.output}: expected a new or empty folder, found files in it; name another folder"
        )


def _publish(folder: Path, output: Path) -> None:
    """All artifacts or none: they are written beside the folder, absent or empty, that they then become."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}-", dir=output.parent) as name:
            whole = Path(name) / output.name
            whole.mkdir()
            for file in ARTIFACTS:
                shutil.copyfile(folder / file, whole / file)
            whole.replace(output)
    except OSError as error:
        raise StorageError(
            f"{output}: cannot write ({error.strerror}); free space there, or choose another place"
        ) from None


def _refuse_dropout(bundle: Bundle, variant: Variant) -> None:
    """Its masks follow from seeds that our runtime draws; the library has nobody who would."""
    for role in variant.forward_roles:
        if DROPOUT_SEEDS in [value.name for value in read_graph(bundle, variant.graphs[role]).graph.input]:
            raise ModelError(
                f"{bundle.path}: was made with --dropout, which onnxruntime-training cannot be fed; calibrate"
                " without it"
            )


def _write_parameters(bundle: Bundle, variant: Variant, folder: Path) -> None:
    """The starting weights, original and unfolded, in the order of the graphs' inputs."""
    folder.mkdir()
    weights = bundle.arrays(WEIGHTS_MEMBER)
    for number, name in enumerate(trained_shapes(bundle, variant)):
        tensor = numpy_helper.from_array(weights[name], name)
        (folder / f"{number:06}.pb").write_bytes(tensor.SerializeToString())


def _let_the_library_write(folder: Path, python: str) -> None:
    """A process of its own: onnxruntime-training and onnxruntime are one module and cannot share a program."""
    script = (
        folder / "write_checkpoint.py"
    )  # Python looks for modules beside a script: none of ours may be there
    shutil.copyfile(write_checkpoint.__file__, script)
    command = [python, str(script), str(folder)]
    try:
        end = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlatformError(
            f"--ort-python {python}: cannot run ({error}); give the python of an environment with"
            " onnxruntime-training, such as .venv-ort/bin/python"
        ) from None
    said = next((line for line in reversed(end.stderr.splitlines()) if line.strip()), "no reason given")
    if end.returncode == write_checkpoint.NOT_INSTALLED:
        raise PlatformError(
            f"the checkpoint is written by onnxruntime-training, which {python} does not have ({said}); it"
            " shares its import name with onnxruntime, so make an environment of its own (CPython 3.11 or"
            f" older, x86-64): python3.11 -m venv .venv-ort, .venv-ort/bin/{INSTALL}, and name it with"
            " --ort-python .venv-ort/bin/python"
        )
    if end.returncode != 0:
        raise ModelError(
            f"onnxruntime-training of {python} refused the artifacts ({said}); nothing was written:"
            f" expected the versions of {INSTALL}; if it has these, please report this package"
        )
