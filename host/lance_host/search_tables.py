"""Tables for choosing: what can be trained, and what a memory budget buys."""

import math
from collections.abc import Sequence

from lance_host.budget import BudgetPlan
from lance_host.layers import Candidate
from lance_host.text import GAP, WIDTH, aligned, count, grid, human_bytes, shorten, width


def budget_table(plans: Sequence[BudgetPlan]) -> str:
    """What a method made of its budget, beside what one energy for all layers gives at the same bytes.

    `plans` differ in the number of layers, ascending.  Every layer of the last is a row, of the others the
    totals are.  Gradient errors are relative to the exact gradient.
    """
    *fewer, plan = plans
    layers = plan.search.layers
    columns = [["layer", *(one.layer for one in layers), "total"]]
    norms = [one.gradient_norm or 1.0 for one in layers]
    for candidates, label in (
        (plan.chosen, "ranks"),
        (plan.uniform, f"ε {_rounded_down(plan.search.energy)}: ranks"),
    ):
        sizes = [one.nbytes for one in candidates]
        shares = [one.error / norm for one, norm in zip(candidates, norms, strict=True)]
        shares.append(plan.relative_error(candidates))
        columns += [
            [label, *aligned([[str(rank) for rank in one.ranks] for one in candidates]), ""],
            ["bytes", *map(human_bytes, sizes), human_bytes(sum(sizes))],
            ["error %", *(f"{100 * share:.1f}" for share in shares)],
        ]
    room = WIDTH - sum(width(column) + len(GAP) for column in columns[1:])
    columns[0] = [shorten(name, room) for name in columns[0]]
    heading = (
        f"{plan.method.upper()}, memory budget {human_bytes(plan.budget)}: ranks with the least error of the"
        " weight gradients,\nbeside one energy for all layers that takes as many bytes."
        " Ranks: batch, channels, height, width\n(linear layers: batch, tokens, features)."
    )
    totals = (
        f"{count(len(one.chosen), 'layer')}: error {100 * one.relative_error(one.chosen):.1f} %, with ε"
        f" {_rounded_down(one.search.energy)} {100 * one.relative_error(one.uniform):.1f} %"
        for one in fewer
    )
    return "\n".join([heading, "", *grid(columns), *totals])


def _rounded_down(energy: float) -> str:
    """Four digits; `--energy` with them takes no more bytes than this energy."""
    return f"{math.floor(energy * 1e4) / 1e4:.4f}"


def candidate_table(
    candidates: Sequence[Candidate], batch_size: int, head: str | None, kept: str | None = None
) -> str:
    """What can be trained, a row per layer, and what the last K of them cost plain backpropagation.

    `last K` is the number for `--layers` that takes this layer and all below it.
    """
    if not candidates:
        return (
            "No layer that could be trained (nn.Conv1d, nn.Conv2d or nn.Linear beside the classifier):"
            " --layers 0 trains the classifier alone."
        )
    stored = [candidate.bp_bytes(batch_size) for candidate in candidates]
    totals = [human_bytes(sum(stored[index:])) for index in range(len(stored))]
    columns = [
        ["last K", *(str(len(candidates) - index) for index in range(len(candidates)))],
        ["kind", *(candidate.kind for candidate in candidates)],
        ["weight", *("x".join(map(str, candidate.weight_shape)) for candidate in candidates)],
        ["values", *(f"{candidate.parameters:,}" for candidate in candidates)],
        ["input", *("x".join(map(str, candidate.input_shape)) for candidate in candidates)],
        ["BP bytes", *map(human_bytes, stored)],
        ["of last K", *totals],
    ]
    names = ["layer", *(candidate.name for candidate in candidates)]  # whole: they are meant to be copied
    trained = f"{head} is replaced and always trains"
    if head is None:
        trained = "is not trained (--head none)" + (f" unless --layers names {kept}" if kept else "")
    notes = [
        "",
        f"Bytes: float32 inputs at a batch of {batch_size}. The classifier {trained}.",
        "--layers: a count from the end, conv:K, linear:K, pointwise:K, names and globs (layer4.*), or all.",
    ]
    return "\n".join([*grid([names, *columns]), *notes])
