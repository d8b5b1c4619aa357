"""`lance-host continual`: continual-learning benchmarks."""

import sys
from dataclasses import replace
from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--benchmark", required=True, help="split-cifar100, split-cifar10, split-fashion, five-datasets.")
@click.option(
    "--method",
    default="finetune,gpm,lance",
    show_default=True,
    help="Comma-separated, or all: lance, gpm, finetune (all three trained by the device runtime), multitask,"
    " er, ewc, agem.",
)
@click.option(
    "--network", help="alexnet or resnet18-reduced. Default: the one that the benchmark is published with."
)
@click.option(
    "--data", type=PATH, required=True, help="Folder with the data sets: cifar10/, fashion-mnist/, ..."
)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each method.")
@click.option("--out", type=PATH, required=True, help="Folder for results; what is there is gone on with.")
@click.option(
    "--preset",
    default="quick",
    show_default=True,
    help="quick: part of the images and few epochs, the order of methods within half an hour; paper: all of it,"
    " for hours.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="At most, of each task. Default: the preset's.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate at the start of each task. Default: the preset's.",
)
@click.option(
    "--batch-norm",
    type=click.Choice(["running", "batch"]),
    default="running",
    show_default=True,
    help="running: statistics of the first task, frozen; batch: those of each batch, at test too, as published"
    " (methods in PyTorch only).",
)
@click.option(
    "--relax",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Loosen the protection of directions that earlier tasks need little, and this one much: 0 is strict.",
)
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of what a task has outside of the memory that lance keeps: fewer bytes, slower learning."
    " Default: 0.98, as published.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
def continual(
    benchmark: str,
    method: str,
    network: str | None,
    data: Path,
    seeds: int,
    out: Path,
    preset: str,
    epochs: int | None,
    lr: float | None,
    batch_norm: str,
    relax: float,
    energy: float | None,
    threads: int | None,
) -> None:
    """Learn the tasks of a benchmark one after the other, and see what is forgotten.

    \b
    lance-host continual --benchmark split-cifar10 --data sets/ --seeds 1 --out results/
    lance-host continual --benchmark split-fashion --method all --data sets/ --out results/
    lance-host continual --benchmark split-cifar100 --method lance --data sets/ --preset paper --out results/

    Writes results.csv (every accuracy), summary.csv and table.md (mean and deviation over seeds), heatmap.png
    and curves.png. The same command goes on where it was broken off.
    """
    from lance_host.continual_benchmark.figures import can_draw, write_figures
    from lance_host.continual_benchmark.methods import choose_methods
    from lance_host.continual_benchmark.protocol import as_batch_norm, choose_preset
    from lance_host.continual_benchmark.report import TABLE
    from lance_host.continual_benchmark.run import BenchmarkRequest, Voice, run_benchmark

    chosen = choose_preset(preset)
    if epochs is not None:
        chosen = replace(chosen, recipe=replace(chosen.recipe, epochs=epochs))
    if lr is not None:
        chosen = replace(chosen, recipe=replace(chosen.recipe, lr=lr), gpm_lr=lr)
    request = BenchmarkRequest(
        benchmark=benchmark,
        methods=choose_methods(method),
        data=data,
        out=out,
        preset=chosen,
        seeds=seeds,
        network=network,
        batch_norm=as_batch_norm(batch_norm),
        relax=relax,
        energy=energy,
        threads=threads,
    )
    folder, settings = run_benchmark(request, Voice(click.echo, _epochs))
    if can_draw():
        write_figures(folder, settings)
    else:
        click.echo("no figures: they need matplotlib, which pip install 'lance-edge[host]' brings", err=True)
    click.echo((folder / TABLE).read_text(encoding="utf-8"))
    click.echo(f"wrote {folder}")


def _epochs(done: int, most: int) -> None:
    """A counter on a terminal, nothing in a log."""
    if sys.stderr.isatty():
        click.echo(f"\r  epoch {done} of at most {most}  ", nl=done == most, err=True)
