"""`lance-host calibrate` and `layers`: from a network to a package."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lance_edge.errors import OptionError
from lance_edge.manifest import MODES
from lance_host.cli_continual import DEFAULT_METHODS, files_first, next_task_options, past_of
from lance_host.cli_options import FILE, HEAD, INPUT_SIZE, MODEL, numbers, progress_bars, wrote


@click.command()
@MODEL
@click.option("--data", type=FILE, help="Class folders (photos/<class>/*.jpg, or train/ and test/) or .npz.")
@click.option(
    "-o", "--output", type=FILE, default=Path("pkg.tar"), show_default=True, help="The package to write."
)
@click.option(
    "--weights",
    help="File (.pth, .safetensors), 'random' or 'bundled'. Default: published, from cache or download.",
)
@click.option(
    "--layers",
    help="Train the last K layers (convolutions and linear ones) and the head; 0: head only; conv:K, linear:K,"
    " pointwise:K: of this kind (pointwise: not depthwise); names and globs as 'layer4.*,layer3.1.conv2', a"
    " number among them as '[13]'; all. With several counts (1-10, or 2,4) the device chooses one. Default: 4,"
    " or those of the task before.",
)
@HEAD
@click.option("--train-bias", is_flag=True, help="Train the biases of these layers as well.")
@click.option(
    "--train-norm",
    is_flag=True,
    help="Train scale and shift of the norm layers from the first trained layer on; statistics stay frozen.",
)
@click.option(
    "--dropout",
    is_flag=True,
    help="Training drops activations where the network has an nn.Dropout (or Dropout1d, 2d, 3d: whole channels)"
    " behind the first trained layer.",
)
@click.option(
    "--methods",
    help="Comma-separated, or all; the first is the device's default. Default: lance,bp; lance with --memory.",
)
@click.option(
    "--energy",
    type=float,
    help="Share of the activations' variance that each mode keeps.  Default: 0.7; 0.98 after an earlier task.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Compress a convolution's channels, height and width, or its patches.  Default: patch after an earlier"
    " task, else channel.",
)
@click.option(
    "--any-rank",
    is_flag=True,
    help="With --mode patch: graphs of which lance-device next-task makes the next package on the board.",
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
    type=float,
    help="Share of the training images that best.npz is chosen on.  Default: 0.1, or the task before's.",
)
@click.option(
    "--split-seed",
    type=int,
    help="Divides class folders that have no test/ (75/25).  Default: 0, or the task before's.",
)
@click.option(
    "--seed",
    type=int,
    help="Calibration order, new head, random weights.  Default: 0, or the task before's.",
)
@click.option("--threads", type=int, help="For calibration. Default: all cores.")
@click.option("--task-name", "task", help="Of what the package trains. Default: after --data.")
@next_task_options
@click.pass_context
@files_first
def calibrate(
    context: click.Context,
    /,
    methods: str | None,
    memory_budget: str | None,
    validation: float | None,
    split_seed: int | None,
    **options: Any,
) -> None:
    """Find the activations' subspaces, compile the training graphs, write one package.

    \b
    lance-host calibrate --model mcunet --data photos/ -o pkg.tar
    lance-host calibrate --model mcunet --data photos/ --layers 2 --energy 0.9 -o better.tar
    lance-host calibrate --model mcunet --data photos/ --memory-budget 64KiB -o small.tar
    lance-host calibrate --model mcunet --weights own.pth --data photos/ --layers 0 -o head.tar
    lance-host calibrate --model net.py:make --input-size 96 --data photos/ --layers 'stage4.*' -o own.tar
    lance-host calibrate --model mcunet --data photos/ --layers 1-10 --methods all -o bench.tar
    lance-host calibrate --memory memory.npz --checkpoint run/last.npz --data next/ -o next.tar
    """
    from lance_host.budget import parse_budget
    from lance_host.build import calibrate as build
    from lance_host.continual import calibrate_next
    from lance_host.request import Feedback, Request
    from lance_host.selection import method_names
    from lance_host.tables import layer_table, rank_advice, saved_line

    if validation is not None and not 0 <= validation < 1:
        raise OptionError(f"--validation: expected a share from 0 to below 1, found {validation}")
    past = past_of(options, is_model_given=_is_given(context, "model"))
    split, options["seed"] = _split_and_seed(past, split_seed, validation, options["seed"])
    names = method_names(methods or DEFAULT_METHODS[past is not None and past.memory is not None])
    budgets = {} if memory_budget is None else parse_budget(memory_budget, names)
    request = Request(methods=names, split=split, budgets=budgets, after=past, **options)
    with progress_bars() as progress:
        feedback = Feedback(say=click.echo, progress=progress)
        manifest = build(request, feedback) if past is None else calibrate_next(request, past, feedback)
    click.echo()
    click.echo(layer_table(manifest))
    click.echo(f"\n{saved_line(manifest)}")
    if advice := rank_advice(manifest):
        click.echo(advice)
    click.echo(wrote(options["output"]))


def _split_and_seed(
    past: Any, split_seed: int | None, validation: float | None, seed: int | None
) -> tuple[Any, int]:
    """As asked for, else as the task before had them, so that workstation and board take the same images."""
    from lance_edge.input_spec import DEFAULT_SPLIT
    from lance_host.past import package_before

    split, before = DEFAULT_SPLIT, 0
    if past is not None:
        manifest = package_before(past.artifact, past.checkpoint)
        split, before = manifest.split, manifest.seed
    if split_seed is not None:
        split = replace(split, seed=split_seed)
    if validation is not None:
        split = replace(split, validation_fraction=validation)
    return split, before if seed is None else seed


def _is_given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT


@click.command()
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
    from lance_edge.input_spec import DEFAULT_SPLIT
    from lance_host.inputs import InputRequest, check_input
    from lance_host.layers import list_layers
    from lance_host.network import NetworkRequest, open_network
    from lance_host.search_tables import candidate_table

    inputs = InputRequest(size=resolution)
    check_input(inputs)
    shape = None if data is None else open_dataset(data, DEFAULT_SPLIT).array_shape
    network = open_network(NetworkRequest(model, head=head, input=inputs), None, click.echo, shape)
    candidates = list_layers(network.module, network.preprocessing.sample_shape, network.head or network.kept)
    click.echo(candidate_table(candidates, batch_size, network.head, network.kept))
