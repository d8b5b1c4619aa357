"""`lance-host reproduce`: the paper's tables and figures, a command for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lance_host.reproduce.study import DEFAULT_DATASETS, Study, counts, named_values

PATH = click.Path(path_type=Path)

# Name -> what its help says; `lance_host.reproduce.claims` has what it does.
HELP = {
    "table1": "Pretrain on one half of the classes, fine-tune on the other.",
    "table2": "Accuracy, activation memory and multiply-adds of BP, HOSVD, ASI and LANCE.",
    "table8": "The same with batches of 4 and 8, depthwise convolutions not counted.",
    "fig2": "Angle between LANCE's and BP's gradients, epoch by epoch.",
    "fig3": "Ablation of the energy threshold ε and the number N of calibration batches, with the most layers.",
    "fig4": "Gradient angle, activation memory and accuracy over ε, with the most layers.",
    "fig5": "Time of a training step over 1 to 10 layers, every method, phase by phase.",
    "theory": "Descent, monotone loss and projected stationarity on a quadratic, asserted; how they break.",
}
EXAMPLES = {"theory": "--out reproduced/", "table2": "--data cifar10=data/cifar10 --datasets cifar10 --quick"}

OPTIONS = {
    "--out": click.option(
        "--out", type=PATH, default=Path("reproduced"), show_default=True, help="Folder for cells and results."
    ),
    "--preset": click.option(
        "--preset",
        type=click.Choice(["quick", "paper"]),
        default="paper",
        show_default=True,
        help="paper: all images, 50 epochs; quick: 2,000 images, 5 epochs, about ten minutes with MCUNet.",
    ),
    "--quick": click.option("--quick", is_flag=True, help="The same as --preset quick."),
    "--models": click.option("--models", default="mcunet", show_default=True, help="Networks, with commas."),
    "--datasets": click.option(
        "--datasets", default=",".join(DEFAULT_DATASETS), show_default=True, help="Data sets, with commas."
    ),
    "--data": click.option(
        "--data", "places", multiple=True, metavar="NAME=PLACE", help="Where a data set is: folder or .npz."
    ),
    "--data-root": click.option(
        "--data-root",
        type=PATH,
        default=Path("data"),
        show_default=True,
        help="Folder of the others: ROOT/NAME.",
    ),
    "--weights": click.option(
        "--weights", multiple=True, metavar="MODEL=FILE", help="Of a network.  [default: its published ones]"
    ),
    "--seeds": click.option(
        "--seeds",
        default="0",
        show_default=True,
        help="0, or 0-2: each cell is run with every one; fig5 and theory take the first.",
    ),
    "--layers": click.option("--layers", default="2,4", show_default=True, help="Counts of trained layers."),
    "--methods": click.option(
        "--methods", default="all", show_default=True, help="Of lance,bp,asi,hosvd; lance is always."
    ),
    "--batch-size": click.option(
        "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Of training."
    ),
    "--lr": click.option(
        "--lr", type=float, default=0.05, show_default=True, help="Learning rate, the published one."
    ),
    "--weight-decay": click.option(
        "--weight-decay", type=float, default=0.0, show_default=True, help="Published, as far as we know: none."
    ),
    "--threads": click.option(
        "--threads", type=click.IntRange(min=1), help="Of every process.  [default: all cores]"
    ),
}
NOT_OF = {  # options that a command would not use
    "table1": {"--weights"},  # pretrained here
    "table8": {"--batch-size"},
    "fig2": {"--methods"},
    "fig3": {"--methods"},
    "fig4": {"--methods"},
    "fig5": {"--layers", "--lr", "--weight-decay"},
    "theory": {*OPTIONS} - {"--out", "--seeds"},  # neither networks nor images
}


@click.group()
def reproduce() -> None:
    """Run the paper's tables and figures again, beside the published values.

    \b
    lance-host reproduce theory
    lance-host reproduce table2 --models mcunet --datasets cifar10 --data cifar10=data/cifar10
    lance-host reproduce fig2 --quick --data cifar10=data/cifar10 --datasets cifar10

    Every cell is a package and a run folder in --out, trained by lance-device itself. Finished cells are
    skipped, so the same command goes on where it was stopped. Each claim writes CSV, a Markdown table and a
    picture; what is not on this machine (a data set, published weights) is a row that says so.
    """


def run(name: str, **values: Any) -> None:
    """Run a claim as asked for, and print its table."""
    from lance_edge.errors import Interrupted
    from lance_host.reproduce.claims import reproduce as run_claim
    from lance_host.reproduce.device import STOPPED

    study = _study(values)
    try:
        click.echo(run_claim(name, study))
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None
    click.echo(f"\nwrote {name}.csv, .md, .png and .json to {study.out}")


def _study(values: dict[str, Any]) -> Study:
    """As asked for; what a command has no option for is as the study has it."""
    from lance_host.selection import method_names

    read: dict[str, Callable[[Any], Any]] = {
        "models": _names,
        "datasets": _names,
        "places": lambda texts: {name: Path(place) for name, place in named_values("--data", texts).items()},
        "weights": lambda texts: named_values("--weights", texts),
        "seeds": lambda text: counts("--seeds", text),
        "layers": lambda text: counts("--layers", text),
        "methods": method_names,
    }
    if values.pop("quick", False):
        values["preset"] = "quick"
    asked = {name: read[name](value) if name in read else value for name, value in values.items()}
    return Study(say=lambda text: click.echo(text, err=True), **asked)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))


def _command(name: str) -> click.Command:
    def callback(**values: Any) -> None:
        run(name, **values)

    example = EXAMPLES.get(name, "--quick --datasets cifar10 --data cifar10=data/cifar10")
    callback.__doc__ = f"{HELP[name]}\n\n\b\nlance-host reproduce {name} {example}"
    decorated: Callable[..., None] = callback
    for option in reversed([OPTIONS[text] for text in OPTIONS if text not in NOT_OF.get(name, ())]):
        decorated = option(decorated)
    return click.command(name)(decorated)


for _name in HELP:
    reproduce.add_command(_command(_name))
