"""The command line: `python -m benchmarks`."""

import argparse
import datetime
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.arguments import counts, make_folder, positive
from benchmarks.compare import Comparison, compare
from benchmarks.material import Recipe, make_material
from benchmarks.plan import Options
from benchmarks.report import heading_of, report, warnings_of
from benchmarks.rows import PeerSummary, summarise
from lance_device.bench_report import about_load
from lance_device.measure import write_rows
from lance_device.options import available_cores
from lance_device.run_record import describe_machine, describe_software, file_sha256, write_record
from lance_edge.bundle import Bundle
from lance_edge.errors import Interrupted, LanceError
from lance_edge.files import atomic_writer
from lance_edge.manifest import Manifest
from lance_edge.units import count


def main(words: list[str] | None = None) -> int:
    """Make the material, compare, report."""
    arguments = _arguments(words)
    try:
        with tempfile.TemporaryDirectory(prefix="lance-peers-") as folder:
            _run(arguments, Path(folder))
    except LanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {arguments.out}", file=sys.stderr)
        return Interrupted.exit_code
    return 0


def _run(arguments: argparse.Namespace, folder: Path) -> None:
    busy = about_load()
    if busy is not None:
        _say(f"warning: {busy}")
    out: Path = arguments.out
    make_folder(out)
    material = make_material(_recipe(arguments), folder, _say)
    with Bundle(material.package) as bundle:
        manifest = bundle.manifest
    options = _options(arguments)
    result = compare(options, manifest, material, out / "steps.csv", _say)
    summaries = summarise(result.rows)
    warnings = (*warnings_of(result.rows, summaries), *(f"not measured: {text}" for text in result.failures))
    budgeted = {len(v.layers) for v in manifest.variants if v.method == "lance" and v.budget_bytes is not None}
    text = report(summaries, result.trials, warnings, _heading(options, manifest), budgeted=budgeted)
    _write(out, result, summaries, text, arguments, material.package)
    print(text)
    _say(f"wrote {out}/report.md, steps.csv, summary.csv, run.json")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="A training step in our runtime, in PyTorch and in ONNX Runtime, side by side.",
    )
    parser.add_argument("--quick", action="store_true", help="one round, 4 layers: about two minutes, not ten")
    parser.add_argument("--layers", type=counts, help="trained layers, 1-10 or 2,4  [2,4; --quick: 4]")
    parser.add_argument("--rounds", type=positive, help="over all contenders  [3; --quick: 1]")
    parser.add_argument("--micro-batch", type=positive, default=8, help="of ours and ONNX Runtime's  [8]")
    parser.add_argument("--batch-size", type=positive, default=128, help="of a new package  [128]")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="[the cores]")
    parser.add_argument("--artifact", type=Path, help="a package to measure instead of a new one")
    parser.add_argument("--model", default="mcunet", help="network of a new package  [mcunet]")
    parser.add_argument("--resolution", type=positive, help="of its images  [the network's]")
    parser.add_argument("--weights", default="bundled", help="of a new package, as in lance-host  [bundled]")
    name = f"bench-peers-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    parser.add_argument("--out", type=Path, default=Path(name), help="new folder for the figures")
    return parser.parse_args(words)


def _options(arguments: argparse.Namespace) -> Options:
    quick = arguments.quick
    return Options(
        layers=arguments.layers or ((4,) if quick else (2, 4)),
        micro_batch=arguments.micro_batch,
        threads=arguments.threads,
        rounds=arguments.rounds or (1 if quick else 3),
        quick=quick,
    )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        model=arguments.model,
        weights=arguments.weights,
        layers=_options(arguments).layers,
        batch_size=arguments.batch_size,
        resolution=arguments.resolution,
        threads=arguments.threads,
        artifact=arguments.artifact,
    )


def _heading(options: Options, manifest: Manifest) -> str:
    versions = {name: version(name) for name in ("onnxruntime", "torch", "numpy")}
    shape = "x".join(map(str, manifest.preprocessing.sample_shape))
    facts = (
        f"{manifest.model}, input {shape}, batch {manifest.batch_size},"
        f" {count(options.threads, 'thread')}, {count(options.rounds, 'round')} in turns, each contender"
        f" in processes of its own; weights: {manifest.weights_source}; energy {manifest.energy:g}."
        f" {datetime.date.today():%Y-%m-%d}."
    )
    return heading_of(describe_machine(), versions, facts)


def _write(
    out: Path,
    result: Comparison,
    summaries: tuple[PeerSummary, ...],
    text: str,
    arguments: argparse.Namespace,
    package: Path,
) -> None:
    write_rows(out / "summary.csv", PeerSummary, summaries)
    with atomic_writer(out / "report.md") as file:
        file.write(text.encode())
    software = describe_software()
    software["versions"]["torch"] = version("torch")
    record = {
        "kind": "peer comparison",
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "artifact": {"path": str(package), "file_sha256": file_sha256(package)},
        "tuning": [
            {"setting": str(t.tuning), "cached": t.cached, "ms": t.train_ms, "failure": t.failure}
            for t in result.trials
        ],
        "failures": result.failures,
        "machine": describe_machine(),
    }
    write_record(out / "run.json", record | software)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
