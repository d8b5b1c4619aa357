"""The gradient angles of a run as cells: measured once, and kept."""

from dataclasses import asdict

from lance_host.reproduce.cells import Cells, digest
from lance_host.reproduce.gradients import gradient_angles
from lance_host.reproduce.material import Material
from lance_host.reproduce.trained import Plan


def plan_angles(cells: Cells, material: Material, plan: Plan, seed: int, file: str | None) -> dict[str, float]:
    """`mean_deg` and `worst_deg` over the preset's batches, with the weights in a file of the run.

    Args:
        file: a checkpoint; `None`: the weights that training begins with.

    Raises:
        LanceError: if the run cannot be made, or its files are not there.
    """
    batches = cells.study.size.gradient_batches
    package = cells.package(material, seed, **plan.package)
    run = cells.run(material, package, seed, method=plan.method, layers=plan.layers, **plan.words)

    def measure() -> dict[str, float]:
        checkpoint = None if file is None else run / file
        found = gradient_angles(material, package, plan.layers, checkpoint, batches, seed)
        cells.study.say(f"{run.name}, {file or 'first weights'}: {found.mean_deg:.1f} degrees")
        return asdict(found)

    return cells.numbers(f"angles-{run.name}-{digest([file, batches])}", measure)
