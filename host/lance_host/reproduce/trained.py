"""Cells that are a training run for each seed: what the tables and figures 3 and 4 are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lance_edge.bundle import Bundle
from lance_edge.errors import Interrupted, LanceError, StorageError
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Cell, Finding
from lance_host.reproduce.material import AbsentError, Material, find_material
from lance_host.reproduce.outcome import Outcome, graph_gmacs, paper_gmacs, read_outcome
from lance_host.reproduce.study import Study

HEAD_ONLY = "head only"
QUANTITIES = ("accuracy_percent", "activation_mib", "saved_mib")
FAILED = "failed: "


@dataclass(frozen=True)
class Plan:
    """A cell, the package that it needs (fields of `Request`), and what of it trains.

    `words` are further options of `lance-device train`.
    """

    cell: Cell
    package: Mapping[str, Any]
    method: str
    layers: int
    words: Mapping[str, Any] = field(default_factory=dict)


def method_plans(
    claim: str,
    model: str,
    dataset: str,
    methods: Sequence[str],
    layers: Sequence[int],
    setting: str,
    kind: str = "",
    **options: Any,
) -> list[Plan]:
    """The head alone, then every method with every count of layers.

    Each method has a package of its own, so that a cell stays the same whatever else is asked for beside it.

    Args:
        kind: of layers that are counted, `pointwise:` for instance.
        options: of the package.
    """
    counts = ",".join(map(str, layers))
    packages = {name: {**options, "layers": kind + counts, "methods": (name,)} for name in methods}
    packages["bp"] = {**options, "layers": f"{kind}0,{counts}".removesuffix(","), "methods": ("bp",)}
    plans = [Plan(Cell(claim, model, dataset, HEAD_ONLY, 0, setting), packages["bp"], "bp", 0)]
    return plans + [
        Plan(Cell(claim, model, dataset, method, count, setting), packages[method], method, count)
        for count in layers
        for method in methods
    ]


def shared_plans(study: Study, claim: str, model: str, dataset: str, methods: Sequence[str]) -> list[Plan]:
    """The head alone, and some methods: the cells of table 2, whose packages and runs serve the figures too.

    LANCE keeps the weights of every epoch, which figure 2 reads.
    """
    plans = method_plans(claim, model, dataset, study.methods, study.layers, "", batch_size=study.batch_size)
    words = {"lance": {"keep_every": 1}}
    return [
        replace(plan, words=words.get(plan.method, {}))
        for plan in plans
        if plan.cell.method in (HEAD_ONLY, *methods)
    ]


def lance_plan(study: Study, claim: str, model: str, dataset: str, setting: str, **options: object) -> Plan:
    """LANCE with the most layers and other options of its package; with those of table 2, it is that cell."""
    plan = shared_plans(study, claim, model, dataset, ("lance",))[-1]
    package = {**plan.package, **options}
    return replace(plan, cell=replace(plan.cell, setting=setting), package=package)


def run_plans(cells: Cells, model: str, dataset: str, plans: Sequence[Plan]) -> list[Finding]:
    """The findings of all plans on one network and data set; what cannot be run is a row that says why."""

    def work() -> list[Finding]:
        material = find_material(cells.study, model, dataset)
        return [finding for plan in plans for finding in run_plan(cells, material, plan)]

    return guarded(cells.study, [plan.cell for plan in plans], QUANTITIES[:2], work)


def run_plan(cells: Cells, material: Material, plan: Plan) -> list[Finding]:
    """The findings of one cell; one that fails is a row too, and the others go on."""
    return guarded(cells.study, [plan.cell], QUANTITIES[:2], lambda: _run_plan(cells, material, plan))


def guarded(
    study: Study, asked: Sequence[Cell], quantities: Sequence[str], work: Callable[[], list[Finding]]
) -> list[Finding]:
    """What `work` finds; if it fails, or something is absent, a row that says why for each cell and quantity.

    Args:
        asked: the cells that get no numbers without this work.

    Raises:
        Interrupted, StorageError: which would meet all other work as well.
    """
    try:
        return work()
    except (Interrupted, StorageError):
        raise
    except AbsentError as reason:
        note = str(reason)
    except LanceError as error:
        note = f"{FAILED}{error}"
    first = asked[0]
    study.say(f"{first if len(asked) == 1 else f'{first.model} on {first.dataset}'}: {note}")
    return [cell.found(name, (), note) for cell in asked for name in quantities]


def did_run(found: Sequence[Finding]) -> bool:
    """Whether a cell has its numbers: what follows from a run that failed would only fail again."""
    return all(one.measured is not None for one in found)


def _run_plan(cells: Cells, material: Material, plan: Plan) -> list[Finding]:
    outcomes: list[Outcome] = []
    for seed in cells.study.seeds:
        package = cells.package(material, seed, **plan.package)
        run = cells.run(material, package, seed, method=plan.method, layers=plan.layers, **plan.words)
        outcomes.append(read_outcome(run))
    with Bundle(package) as bundle:
        variant = bundle.manifest.variant(plan.method, plan.layers)
        macs = {"paper_gmacs": paper_gmacs(variant), "graph_gmacs": graph_gmacs(bundle.manifest, variant)}
    found = [plan.cell.found(name, [getattr(one, name) for one in outcomes]) for name in QUANTITIES]
    return found + [plan.cell.found(name, [value]) for name, value in macs.items()]
