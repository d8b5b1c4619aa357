"""Table 1: pretrain on one half of the classes, fine-tune on the other.

The paper does this with ImageNet; where that is not there, any data set of classes shows the same.
"""

from collections.abc import Sequence

from lance_edge.errors import DataError
from lance_host.reproduce.cells import Cells, digest
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.material import (
    PAPERS,
    AbsentError,
    Material,
    class_names,
    find_data,
    sized_data,
)
from lance_host.reproduce.pretrain import Pretraining, pretrain
from lance_host.reproduce.study import Study
from lance_host.reproduce.trained import Plan, guarded, method_plans, run_plan

LEAST_CLASSES = 4  # two of each half


def table1(cells: Cells) -> list[Finding]:
    """A row for each method and number of layers, on the half that pretraining never saw."""
    study, findings = cells.study, list[Finding]()
    for model in study.models:
        for dataset in _datasets(study):
            plans = method_plans(
                "table1",
                model,
                dataset,
                study.methods,
                study.layers,
                "other half of the classes",
                batch_size=study.batch_size,
                resolution=study.size.pretrain_size,
            )
            findings += _pair(cells, model, dataset, plans)
    return findings


def _datasets(study: Study) -> list[str]:
    """Those asked for; before them the paper's, if it is there."""
    try:
        find_data(study, PAPERS)
    except AbsentError:
        return list(study.datasets)
    return list(dict.fromkeys((PAPERS, *study.datasets)))


def _pair(cells: Cells, model: str, dataset: str, plans: Sequence[Plan]) -> list[Finding]:
    """Of one network and data set: pretraining, then every plan."""

    def work() -> list[Finding]:
        material = _second_half(cells, model, dataset)
        return [finding for plan in plans for finding in run_plan(cells, material, plan)]

    return guarded(cells.study, [plan.cell for plan in plans], ("accuracy_percent",), work)


def _second_half(cells: Cells, model: str, dataset: str) -> Material:
    """The classes to fine-tune on, with weights that come from the others.

    Raises:
        AbsentError: if the data set is not there, or has too few classes.
        LanceError: if pretraining fails.
    """
    study = cells.study
    names = class_names(study, dataset)
    if len(names) < LEAST_CLASSES:
        raise AbsentError(f"{dataset}: expected {LEAST_CLASSES} classes or more, found {len(names)}")
    first, second = names[::2], names[1::2]  # every other one: neighbours by name are often alike
    try:
        old = sized_data(study, dataset, first, "first-half")
        new = sized_data(study, dataset, second, "second-half")
    except DataError as error:
        raise AbsentError(f"no usable images: {error}") from None
    size = study.size
    job = Pretraining(model, old, size.pretrain_epochs, size.pretrain_size, study.seeds[0])
    name = f"pretrained-{dataset}-{digest(vars(job))}.pth"
    cells.used.append(name)
    output = study.out / "weights" / name
    if not output.exists():
        with cells.timed(name):
            pretrain(job, output, study.say)
    return Material(model, str(output), dataset, new)
