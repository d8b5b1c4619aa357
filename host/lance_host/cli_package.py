"""`lance-host inspect`, `merge` and `sample-data`: around packages."""

from pathlib import Path

import click

from lance_host.cli_options import FILE, wrote


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--layers", type=click.IntRange(min=0), help="Of a package with several counts: only this one.")
def inspect(artifact: Path, layers: int | None) -> None:
    """Show what a package holds: network, ranks, bytes and multiply-adds of every method.

    Of a memory.npz: how much of each layer earlier tasks need, and how many more tasks fit.

    \b
    lance-host inspect pkg.tar
    lance-host inspect bench.tar --layers 4
    lance-host inspect memory.npz
    """
    from lance_edge.bundle import Bundle
    from lance_edge.memory import read_memory
    from lance_host.memory_table import memory_table
    from lance_host.tables import layer_table, package_table

    if artifact.suffix == ".npz":
        click.echo(memory_table(read_memory(artifact)))
        return

    with Bundle(artifact) as bundle:
        manifest = bundle.manifest if layers is None else bundle.manifest.with_layers(layers)
        click.echo(package_table(manifest))
        click.echo()
        click.echo(layer_table(manifest))


@click.command()
@click.option("--artifact", type=FILE, required=True, help="The package that the run was trained from.")
@click.option("--checkpoint", type=FILE, required=True, help="last.npz or best.npz of the run.")
@click.option("-o", "--output", type=FILE, required=True, help="finetuned.pth, .safetensors or .onnx.")
def merge(artifact: Path, checkpoint: Path, output: Path) -> None:
    """Turn package and checkpoint into a fine-tuned network.

    \b
    lance-host merge --artifact pkg.tar --checkpoint run/last.npz -o finetuned.pth
    lance-host merge --artifact pkg.tar --checkpoint run/best.npz -o finetuned.onnx
    lance-device predict --model finetuned.onnx photo.jpeg
    """
    from lance_host.merge import merge as write

    write(artifact, checkpoint, output)
    click.echo(wrote(output))


@click.command("sample-data")
@click.argument("folder", type=FILE)
@click.option("--per-class", type=int, help="Images of each class at most. Default: all.")
def sample_data(folder: Path, per_class: int | None) -> None:
    """Write a small real image set: handwritten digits as PNG class folders.

    \b
    lance-host sample-data digits/
    """
    from lance_host.sample_data import write_digits

    count = write_digits(folder, per_class)
    click.echo(f"wrote {count} images to {folder}")
