"""`lance-host export-ort`: for programs that train with another runtime."""

import sys
from pathlib import Path

import click

from lance_host.cli_options import FILE


@click.command("export-ort")
@click.option("--artifact", type=FILE, required=True, help="The package to export.")
@click.option("--method", default="lance", show_default=True, help="lance or bp, as the package holds it.")
@click.option(
    "--layers", type=click.IntRange(min=0), help="Of a package with several counts. Default: the largest."
)
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    help="sgd (no momentum, no weight decay) or adamw, both ONNX Runtime's own.",
)
@click.option(
    "--clip", default=0.0, show_default=True, help="Largest norm of the gradient, as in lance-device; 0: none."
)
@click.option(
    "--ort-python",
    metavar="FILE",
    help="Python of the environment that has onnxruntime-training; it writes the checkpoint. Default: this"
    " one.",
)
@click.option("-o", "--output", type=FILE, required=True, help="New folder for the four files.")
def export_ort(
    artifact: Path,
    method: str,
    layers: int | None,
    optimizer: str,
    clip: float,
    ort_python: str | None,
    output: Path,
) -> None:
    """Write the artifacts of ONNX Runtime's own training API, for programs that train with it.

    \b
    python3.11 -m venv .venv-ort
    .venv-ort/bin/pip install onnxruntime-training==1.19.2 onnx==1.17.0 torch==2.13.0
    lance-host export-ort --artifact pkg.tar --method lance --ort-python .venv-ort/bin/python -o dir/

    onnxruntime-training is imported as onnxruntime, like onnxruntime itself, so it needs an environment of its
    own. It is deprecated; its last version is 1.19.2, for x86-64 and CPython up to 3.11, none for ARM.
    """
    from lance_host.ort_training.export import ARTIFACTS, Request, export_artifacts

    python = sys.executable if ort_python is None else ort_python
    batch = export_artifacts(Request(artifact, method, output, layers, optimizer, clip, python))
    click.echo(f"wrote {', '.join(ARTIFACTS)} to {output}")
    click.echo("images in a training step: " + ("any number" if batch is None else f"{batch}, always"))
