"""The command line of the workstation: only the modules called cli print, and know click."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lance_edge import __version__
from lance_edge.errors import LanceError
from lance_host.cli_export import export_ort
from lance_host.cli_reproduce import reproduce

FILE = click.Path(path_type=Path)


def numbers(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Parse `0.5` or `0.485,0.456,0.406`."""
    if text is None:
        return None
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise click.BadParameter(f"expected numbers such as 0.5 or 0.485,0.456,0.406, found {text!r}")
    return values


class Commands(click.Group):
    """Turns an expected failure into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `LanceError` is not a traceback."""
        try:
            return super().invoke(ctx)
        except LanceError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("error: not enough memory; try a smaller --batch-size or --resolution", err=True)
            ctx.exit(9)
        except KeyboardInterrupt:
            click.echo("stopped; nothing was written", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lance-host")
def cli() -> None:
    """Prepare on-device training: calibrate a network once, copy the package to the board.

    \b
    lance-host calibrate --model mcunet --data photos/ --layers 4 -o pkg.tar
    scp pkg.tar pi:            # and on the board:  lance-device train --artifact pkg.tar ...
    lance-host merge --artifact pkg.tar --checkpoint run/last.npz -o finetuned.pth

    \b
    Exit codes: 0 done; 2 wrong command line; 3 package, 4 checkpoint, 5 data, 6 network or 8 disk cannot be
    used; 7 the numbers ran away; 9 this machine cannot; 130 stopped; 1 anything else.
    """


MODEL = click.option(
    "--model",
    default="mcunet",
    show_default=True,
    help="Network of the zoo (an unknown name lists them), or your own: FILE.py:FACTORY, MODULE:FACTORY,"
    " torchvision:NAME, timm:NAME, FILE.onnx.",
)
INPUT_SIZE = click.option(
    "--input-size",
    "--resolution",
    "resolution",
    type=int,
    help="Pixels of the network's square input. Default: its own; 224 where it does not say.",
)
HEAD = click.option(
    "--head",
    default="linear",
    show_default=True,
    metavar="linear|none|MODULE",
    help="What becomes new for the classes of --data, and trains: the layer that gives the logits; nothing (the"
    " network's own stays, frozen unless --layers names it); or that layer.",
)


@cli.command()
@MODEL
@click.option(
    "--data",
    type=FILE,
    required=True,
    help="Class folders (photos/<class>/*.jpg, or train/ and test/) or .npz.",
)
@click.option(
    "-o", "--output", type=FILE, default=Path("pkg.tar"), show_default=True, help="The package to write."
)
@click.option(
    "--weights",
    help="File (.pth, .safetensors), 'random' or 'bundled'. Default: published, from cache or download.",
)
@click.option(
    "--layers",
    default="4",
    show_default=True,
    help="Train the last K layers (convolutions and linear ones) and the head; 0: head only; conv:K, linear:K,"
    " pointwise:K: of this kind (pointwise: not depthwise); names and globs such as 'layer4.*,layer3.1.conv2';"
    " all. With several counts (1-10, or 2,4) the device chooses one.",
)
@HEAD
@click.option("--train-bias", is_flag=True, help="Train the biases of these layers as well.")
@click.option(
    "--train-norm",
    is_flag=True,
    help="Train scale and shift of the norm layers from the first trained layer on; statistics stay frozen.",
)
@click.option(
    "--methods",
    default="lance,bp",
    show_default=True,
    help="Comma-separated, or all; the first is the device's default.",
)
@click.option(
    "--energy", default=0.7, show_default=True, help="Share of the activations' variance that each mode keeps."
)
@click.option(
    "--memory-budget",
    metavar="SIZE",
    help="Activation bytes of all layers, as 256KiB or lance=256KiB,asi=1MiB: choose the ranks that make the"
    " least gradient error within it, not those of --energy.",
)
@click.option(
    "--batches", default=100, show_default=True, help="Calibration batches at most; no image is used twice."
)
@click.option(
    "--batch-size", type=int, help="Training batch. Default: 128, or what a small data set fills twice."
)
@INPUT_SIZE
@click.option("--mean", callback=numbers, help="Of the input, per channel: 0.5 or 0.485,0.456,0.406.")
@click.option("--std", callback=numbers, help="Of the input, per channel.")
@click.option("--interpolation", help="When images are resized: bilinear, bicubic, lanczos, nearest.")
@click.option(
    "--validation",
    default=0.1,
    show_default=True,
    help="Share of the training images that best.npz is chosen on.",
)
@click.option(
    "--split-seed", default=0, show_default=True, help="Divides class folders that have no test/ (75/25)."
)
@click.option("--seed", default=0, show_default=True, help="Calibration order, new head, random weights.")
@click.option("--threads", type=int, help="For calibration. Default: all cores.")
def calibrate(
    methods: str, memory_budget: str | None, validation: float, split_seed: int, **options: Any
) -> None:
    """Find the activations' subspaces, compile the training graphs, write one package.

    \b
    lance-host calibrate --model mcunet --data photos/ -o pkg.tar
    lance-host calibrate --model mcunet --data photos/ --layers 2 --energy 0.9 -o better.tar
    lance-host calibrate --model mcunet --data photos/ --memory-budget 64KiB -o small.tar
    lance-host calibrate --model mcunet --weights own.pth --data photos/ --layers 0 -o head.tar
    lance-host calibrate --model net.py:make --input-size 96 --data photos/ --layers 'stage4.*' -o own.tar
    lance-host calibrate --model mcunet --data photos/ --layers 1-10 --methods all -o bench.tar
    """
    from lance_edge.manifest import Split
    from lance_host.budget import parse_budget
    from lance_host.build import calibrate as build
    from lance_host.request import Feedback, Request
    from lance_host.selection import method_names
    from lance_host.tables import layer_table, saved_line

    if not 0 <= validation < 1:
        raise LanceError(f"--validation: expected a share from 0 to below 1, found {validation}")
    split = Split(seed=split_seed, test_fraction=0.25, validation_fraction=validation)
    names = method_names(methods)
    budgets = {} if memory_budget is None else parse_budget(memory_budget, names)
    with _progress() as progress:
        manifest = build(
            Request(methods=names, split=split, budgets=budgets, **options),
            Feedback(say=click.echo, progress=progress),
        )
    click.echo()
    click.echo(layer_table(manifest))
    click.echo(f"\n{saved_line(manifest)}")
    click.echo(f"wrote {options['output']} ({options['output'].stat().st_size / 2**20:.1f} MiB)")


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar per named piece of work: call it with (name, done, total)."""
    bars: dict[str, Any] = {}

    def show(name: str, done: int, total: int) -> None:
        if total <= 0:
            return  # a download that does not say how long it is
        if name not in bars:
            bars[name] = click.progressbar(length=total, label=name, file=sys.stderr)
            bars[name].__enter__()
        bar = bars[name]
        bar.update(done - bar.pos)
        if done >= total:
            bar.__exit__(None, None, None)

    try:
        yield show
    finally:
        for bar in bars.values():
            if not bar.finished:
                bar.__exit__(None, None, None)


@cli.command()
@MODEL
@INPUT_SIZE
@HEAD
@click.option("--data", type=FILE, help="An .npz of float32 arrays: says what the network takes.")
@click.option("--batch-size", default=128, show_default=True, help="For which bytes are told.")
def layers(model: str, resolution: int | None, head: str, data: Path | None, batch_size: int) -> None:
    """List what can be trained: name, kind, weights, input, bytes of plain backpropagation.

    \b
    lance-host layers --model resnet18
    lance-host layers --model net.py:make --input-size 96
    lance-host layers --model examples/spoken_words.py:Network --data spoken/new.npz
    """
    from lance_edge.datasets import open_dataset
    from lance_host.inputs import InputRequest, check_input
    from lance_host.layers import list_layers
    from lance_host.network import NetworkRequest, open_network
    from lance_host.request import DEFAULT_SPLIT
    from lance_host.search_tables import candidate_table

    inputs = InputRequest(size=resolution)
    check_input(inputs)
    shape = None if data is None else open_dataset(data, DEFAULT_SPLIT).array_shape
    network = open_network(NetworkRequest(model, head=head, input=inputs), None, click.echo, shape)
    candidates = list_layers(network.module, network.preprocessing.sample_shape, network.head or network.kept)
    click.echo(candidate_table(candidates, batch_size, network.head, network.kept))


@cli.command()
@click.argument("artifact", type=FILE)
@click.option("--layers", type=click.IntRange(min=0), help="Of a package with several counts: only this one.")
def inspect(artifact: Path, layers: int | None) -> None:
    """Show what a package holds: network, ranks, bytes and multiply-adds of every method.

    \b
    lance-host inspect pkg.tar
    lance-host inspect bench.tar --layers 4
    """
    from lance_edge.bundle import Bundle
    from lance_host.tables import layer_table, package_table

    with Bundle(artifact) as bundle:
        manifest = bundle.manifest if layers is None else bundle.manifest.with_layers(layers)
        click.echo(package_table(manifest))
        click.echo()
        click.echo(layer_table(manifest))


@cli.command()
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
    click.echo(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")


@cli.command()
@click.argument("key", type=FILE)
def keygen(key: Path) -> None:
    """Make a key pair for signing packages: KEY stays secret, KEY.pub goes to the boards.

    \b
    lance-host keygen ~/.config/lance-edge/key
    """
    from lance_host.signing import make_keys

    click.echo(f"wrote {key} (keep it secret) and {make_keys(key)} (for lance-device --require-signature)")


@cli.command()
@click.option("--key", type=FILE, required=True, help="The private key of lance-host keygen.")
@click.argument("artifact", type=FILE)
def sign(key: Path, artifact: Path) -> None:
    """Sign a package; copy pkg.tar.sig along with pkg.tar.

    \b
    lance-host sign --key ~/.config/lance-edge/key pkg.tar
    """
    from lance_host.signing import sign as write

    click.echo(f"wrote {write(artifact, key)}")


@cli.command("sample-data")
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


cli.add_command(export_ort)
cli.add_command(reproduce)
