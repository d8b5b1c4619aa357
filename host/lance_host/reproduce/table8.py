"""Table 8: batches of 4 and 8, trained layers counted without depthwise convolutions."""

from dataclasses import replace

from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.trained import method_plans, run_plans

BATCH_SIZES = (4, 8)


def table8(cells: Cells) -> list[Finding]:
    """A row for each batch size, method and number of layers."""
    findings = []
    for model, dataset in cells.study.pairs:
        for size in BATCH_SIZES:
            plans = method_plans(
                "table8",
                model,
                dataset,
                cells.study.methods,
                cells.study.layers,
                f"batch {size}",
                kind="pointwise:",
                batch_size=size,
            )
            words = {"epochs": cells.study.size.small_batch_epochs}
            plans = [replace(plan, words=words) for plan in plans]
            findings += run_plans(cells, model, dataset, plans)
    return findings
