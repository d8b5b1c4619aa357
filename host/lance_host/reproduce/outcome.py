"""What came of a run, read from its folder."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lance_edge.errors import DataError
from lance_edge.manifest import Manifest, Variant
from lance_edge.profiles import HistoryRow, StepRow, read_rows
from lance_host.reproduce.findings import MIB
from lance_host.tables import step_macs

GIGA = 10**9


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        accuracy_percent: of the test images, with the last weights: no test image chose an epoch.
        activation_mib, saved_mib: means over the steps; a report gives the largest, which with HOSVD, whose
            ranks change from step to step, is more.
    """

    accuracy_percent: float
    activation_mib: float
    saved_mib: float


def read_outcome(folder: Path) -> Outcome:
    """The result of a finished run.

    Raises:
        DataError: if its files are not those of one.
    """
    history = list(read_rows(folder / "history.csv", HistoryRow))
    steps = [row for row in read_rows(folder / "steps.csv", StepRow) if row.phase == "step"]
    if not history or history[-1].test_accuracy is None or not steps:
        raise DataError(f"{folder}: expected steps and a test accuracy, found none; remove it and run it again")
    return Outcome(
        accuracy_percent=100 * history[-1].test_accuracy,
        activation_mib=fmean(row.activation_bytes for row in steps) / MIB,
        saved_mib=fmean(row.saved_bytes for row in steps) / MIB,
    )


def paper_gmacs(variant: Variant) -> float:
    """The paper's multiply-adds of the trained layers in a step: forward and weight gradient."""
    return sum(plan.forward_macs + plan.weight_gradient_macs for plan in variant.layers) / GIGA


def graph_gmacs(manifest: Manifest, variant: Variant) -> float:
    """All multiply-adds of a step in the graphs that we emit, frozen part included."""
    return step_macs(manifest, variant) / GIGA
