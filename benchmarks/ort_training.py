"""A step in ONNX Runtime's own training API and in our runtime: `python -m benchmarks.ort_training`."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

from benchmarks.arguments import make_folder, positive
from benchmarks.batches import same_batch
from benchmarks.job import Job
from benchmarks.material import Material, Recipe, make_material
from benchmarks.ort_network import plain_network
from benchmarks.ort_report import StepRow, report
from benchmarks.process import BenchmarkError, measure, reason, watch
from benchmarks.report import heading_of
from lance_device.measure import write_rows
from lance_device.options import available_cores
from lance_device.run_record import describe_machine
from lance_edge.bundle import Bundle
from lance_edge.errors import LanceError, PlatformError
from lance_edge.files import atomic_writer
from lance_edge.units import count
from lance_host.ort_training import export

DRIVER = Path(__file__).with_name("ort_driver.py")
WARMUPS = 1
ENVIRONMENT = "make test-ort-training makes an environment that has it, .venv-ort/bin/python"
LEARNING_RATE = 1e-4  # the same batch again and again, as in `lance-device bench`


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        method: of the package.
        artifacts: folder of what ONNX Runtime's training API trains; "" for our runtime.
        whole: the whole batch at once, as their API has it, not in micro-batches.
    """

    label: str
    method: str
    artifacts: str = ""
    whole: bool = True


CONTENDERS = (
    Contender("its BP, frozen weights as parameters", "bp", "generated"),
    Contender("its BP, frozen weights as constants", "bp", "generated-constants"),
    Contender("our BP inside it", "bp", "bp"),
    Contender("our LANCE inside it", "lance", "lance"),
    Contender("our BP in our runtime, whole batch", "bp"),
    Contender("our LANCE in our runtime, whole batch", "lance"),
    Contender("our BP in our runtime, micro-batch {size}", "bp", whole=False),
    Contender("our LANCE in our runtime, micro-batch {size}", "lance", whole=False),
)


@dataclass(frozen=True)
class Setup:
    """What all measurements have in common; `folder` holds artifacts, and the batch of theirs."""

    material: Material
    folder: Path
    ort_python: str
    layers: int
    batch_size: int
    micro_batch: int
    threads: int
    steps: int


def main(words: list[str] | None = None) -> int:
    """Make the material, measure in turns, report."""
    arguments = _arguments(words)
    try:
        with tempfile.TemporaryDirectory(prefix="lance-ort-bench-") as folder:
            _run(arguments, Path(folder))
    except LanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ort_training", description=__doc__)
    parser.add_argument("--ort-python", default=".venv-ort/bin/python", help="has onnxruntime-training")
    parser.add_argument("--layers", type=positive, default=3, help="trained layers  [3]")
    parser.add_argument("--rounds", type=positive, default=3, help="[3]")
    parser.add_argument("--steps", type=positive, default=3, help="measured steps of a process  [3]")
    parser.add_argument("--micro-batch", type=positive, default=8, help="of our runtime  [8]")
    parser.add_argument("--batch-size", type=positive, default=128, help="of a new package  [128]")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="[the cores]")
    parser.add_argument("--artifact", type=Path, help="a package to measure instead of a new one")
    parser.add_argument("--model", default="mcunet", help="network of a new package  [mcunet]")
    parser.add_argument("--resolution", type=positive, help="of its images  [the network's]")
    parser.add_argument("--weights", default="bundled", help="of a new package  [bundled]")
    name = f"bench-ort-training-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    parser.add_argument("--out", type=Path, default=Path(name), help="new folder of the figures")
    return parser.parse_args(words)


def _run(arguments: argparse.Namespace, folder: Path) -> None:
    there = version_there(arguments.ort_python)  # before minutes of calibration
    make_folder(arguments.out)
    recipe = Recipe(
        model=arguments.model,
        weights=arguments.weights,
        layers=(arguments.layers,),
        methods=("lance", "bp"),
        batch_size=arguments.batch_size,
        resolution=arguments.resolution,
        threads=arguments.threads,
        artifact=arguments.artifact,
    )
    material = make_material(recipe, folder, _say)
    with Bundle(material.package) as bundle:
        batch_size = bundle.manifest.batch_size
    setup = Setup(
        material,
        folder,
        arguments.ort_python,
        arguments.layers,
        batch_size,
        arguments.micro_batch,
        arguments.threads,
        arguments.steps,
    )
    make_artifacts(setup)
    rows = measure_all(setup, arguments.rounds, _say)
    write_rows(arguments.out / "steps.csv", StepRow, rows)
    text = report(rows, _heading(setup, arguments.rounds, there))
    with atomic_writer(arguments.out / "report.md") as file:
        file.write(text.encode())
    print(text)


# --- material -----------------------------------------------------------------------------------------


def make_artifacts(setup: Setup) -> None:
    """Ours by `export-ort`, theirs by `generate_artifacts` on the same network; and the batch.

    Raises:
        LanceError: if one cannot be made.
    """
    for method in ("bp", "lance"):
        export.export_artifacts(
            export.Request(
                setup.material.package,
                method,
                setup.folder / method,
                setup.layers,
                clip=2.0,
                python=setup.ort_python,
            )
        )
    with Bundle(setup.material.package) as bundle:
        variant = bundle.manifest.variant("bp", setup.layers)
        network = plain_network(bundle, variant)
        batch = same_batch(_job(setup, CONTENDERS[-1], 1), bundle.manifest)
    every = slice(None)
    np.savez(setup.folder / "batch.npz", images=batch.images(every)[None], labels=batch.labels(every)[None])
    onnx.save(network, setup.folder / "network.onnx")
    for name, frozen in (
        ("generated", frozen_weights(network, variant.parameters)),
        ("generated-constants", []),
    ):
        _drive(
            setup,
            work="generate",
            network=str(setup.folder / "network.onnx"),
            trained=list(variant.parameters),
            frozen=frozen,
            clip=2.0,
            artifacts=str(setup.folder / name),
        )


def frozen_weights(network: onnx.ModelProto, trained: Iterable[str]) -> list[str]:
    """What the library's examples pass as `frozen_params`: every weight that does not train."""
    return [
        item.name
        for item in network.graph.initializer
        if item.data_type == onnx.TensorProto.FLOAT and item.dims and item.name not in trained
    ]


def _drive(setup: Setup, **order: object) -> int | None:
    """Let the other environment work; its peak memory."""
    file = setup.folder / "order.json"
    file.write_text(json.dumps(order))
    end = watch([setup.ort_python, str(DRIVER), str(file)])
    if end.code != 0:
        raise BenchmarkError(f"{setup.ort_python}: {order['work']} {order['artifacts']}: {reason(end)}")
    return end.peak_rss_kib


# --- measurements -------------------------------------------------------------------------------------


def measure_all(setup: Setup, rounds: int, say: Callable[[str], None]) -> tuple[StepRow, ...]:
    """Every contender in every round, one after the other, each in a process of its own."""
    imports = {
        True: _imports_kib(setup.ort_python, "import onnx, onnxruntime.training.api"),
        False: _imports_kib(sys.executable, "import onnxruntime, lance_device.bench_job, benchmarks.ours"),
    }
    rows: list[StepRow] = []
    for number in range(1, rounds + 1):
        begin = (number - 1) * len(CONTENDERS) // rounds  # whoever is first finds another machine
        for one in CONTENDERS[begin:] + CONTENDERS[:begin]:
            say(f"round {number}: {label(one, setup)}")
            run = _theirs if one.artifacts else _ours
            rows.extend(run(setup, one, number, imports[bool(one.artifacts)]))
    return tuple(rows)


def label(contender: Contender, setup: Setup) -> str:
    """As in the table."""
    return contender.label.format(size=setup.micro_batch)


def _imports_kib(python: str, code: str) -> int | None:
    end = watch([python, "-c", f"{code}; import time; time.sleep(0.1)"])
    if end.code != 0:
        raise BenchmarkError(f"{python}: {reason(end)}")
    return end.peak_rss_kib


def _theirs(setup: Setup, contender: Contender, number: int, imports: int | None) -> list[StepRow]:
    result = setup.folder / "result.npz"
    peak = _drive(
        setup,
        work="train",
        artifacts=str(setup.folder / contender.artifacts),
        batches=str(setup.folder / "batch.npz"),
        steps=WARMUPS + setup.steps,
        learning_rate=LEARNING_RATE,
        threads=setup.threads,
        evaluate=False,
        inference=None,
        result=str(result),
    )
    with np.load(result) as file:
        steps = list(zip(file["latency_ms"].tolist(), file["loss"].tolist(), strict=True))
    return [
        StepRow(label(contender, setup), number, step, step <= WARMUPS, latency, loss, peak, imports)
        for step, (latency, loss) in enumerate(steps, 1)
    ]


def _job(setup: Setup, contender: Contender, number: int) -> Job:
    return Job(
        contender=contender.method,
        package=str(setup.material.package),
        data=str(setup.material.photos),
        model=str(setup.material.model),
        layers=setup.layers,
        micro_batch=setup.batch_size if contender.whole else min(setup.micro_batch, setup.batch_size),
        threads=setup.threads,
        steps=setup.steps,
        round=number,
        warmups=WARMUPS,
    )


def _ours(setup: Setup, contender: Contender, number: int, imports: int | None) -> list[StepRow]:
    return [
        StepRow(
            label(contender, setup),
            number,
            row.step,
            row.warmup,
            row.latency_ms,
            float(row.loss or 0.0),
            row.peak_rss_kib,
            imports,
        )
        for row in measure(_job(setup, contender, number))
        if row.phase == "train"
    ]


def _heading(setup: Setup, rounds: int, there: str) -> str:
    with Bundle(setup.material.package) as bundle:
        manifest = bundle.manifest
    ranks = [list(plan.ranks) for plan in manifest.variant("lance", setup.layers).layers]
    shape = "x".join(map(str, manifest.preprocessing.sample_shape))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    facts = (
        f"{manifest.model}, input {shape}, batch {manifest.batch_size},"
        f" {count(setup.layers, 'trained layer')} and the head, {count(setup.threads, 'thread')},"
        f" {count(rounds, 'round')} in turns; weights: {manifest.weights_source}; LANCE's ranks {ranks};"
        f" load of the machine {load:.1f}."
    )
    versions = {"onnxruntime-training": there, "onnxruntime": version("onnxruntime")}
    return heading_of(describe_machine(), versions, facts)


def version_there(python: str) -> str:
    """The version of onnxruntime-training that an interpreter has.

    Raises:
        PlatformError: if it cannot be run, or has none.
    """
    ask = "from importlib.metadata import version; print(version('onnxruntime-training'))"
    try:
        end = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError as error:
        raise PlatformError(f"--ort-python {python}: cannot run ({error}); {ENVIRONMENT}") from None
    if end.returncode != 0:
        raise PlatformError(f"--ort-python {python}: has no onnxruntime-training; {ENVIRONMENT}")
    return end.stdout.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
