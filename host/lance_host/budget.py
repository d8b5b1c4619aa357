"""A memory budget: its text, and the ranks that make the least gradient error within it.

Each layer takes one of its candidates, so that the sum of gradient errors is least and the sum of bytes within
the budget: the multiple-choice knapsack problem, solved by dynamic programming over bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_edge.accounting import bp_activation_bytes, factored_activation_bytes
from lance_edge.counts import parse_bytes
from lance_edge.errors import LanceError
from lance_edge.manifest import Layer
from lance_host.error_table import Candidate
from lance_host.perplexity import SEARCHES, SearchResult
from lance_host.ranks import Ranks

# Bytes are counted in cells of one float32 value, exactly, up to a budget of 256 KiB; above that in
# cells of the next larger multiple.
CELLS = 1 << 16
VALUE_BYTES = 4


@dataclass(frozen=True)
class BudgetPlan:
    """What a method's layers take of a budget, beside what one energy (ε) for all of them would give.

    `chosen` stands in the order of `search.layers`.
    """

    method: str
    budget: int
    search: SearchResult
    chosen: tuple[Candidate, ...]

    @property
    def ranks(self) -> Ranks:
        """The chosen ranks, by layer."""
        return {layer.layer: one.ranks for layer, one in zip(self.search.layers, self.chosen, strict=True)}

    @property
    def uniform(self) -> tuple[Candidate, ...]:
        """What the single energy gives each layer."""
        return tuple(layer.uniform for layer in self.search.layers)

    def relative_error(self, candidates: Sequence[Candidate]) -> float:
        """The sum of gradient errors over the sum of gradient norms, 0 where nothing has a gradient."""
        norm = math.fsum(layer.gradient_norm for layer in self.search.layers)
        return total_error(candidates) / norm if norm else 0.0


def parse_budget(text: str, methods: Sequence[str]) -> dict[str, int]:
    """Bytes by method, from `256KiB` (for every method with fixed ranks) or `lance=256KiB,asi=1MiB`.

    Raises:
        LanceError: if the text is neither, names a method without fixed ranks or one that is not
            compiled, or no method has fixed ranks.
    """
    able = [method for method in methods if method in SEARCHES]
    if not able:
        raise LanceError(
            f"--memory-budget: expected one of the methods {', '.join(SEARCHES)}, whose ranks are fixed before"
            f" training; found {', '.join(methods)}; add one to --methods"
        )
    if "=" not in text:
        return dict.fromkeys(able, _budget_bytes(text))
    budgets = {}
    for part in text.split(","):
        method, _, amount = (word.strip() for word in part.partition("="))
        if method not in able:
            raise LanceError(
                f"--memory-budget: expected a budget for {' or '.join(able)}, found {part.strip()!r};"
                " write it as 256KiB, or for each method as lance=256KiB"
            )
        if method in budgets:
            raise LanceError(f"--memory-budget: {method} is there twice; give it one budget")
        budgets[method] = _budget_bytes(amount)
    return budgets


def _budget_bytes(text: str) -> int:
    budget = parse_bytes(text)
    if not budget:
        raise LanceError(
            f"--memory-budget: expected a size such as 512B, 256KiB or 1.5MiB, found {text.strip()!r}"
        )
    return budget


def check_budget(method: str, budget: int, selections: Iterable[Sequence[Layer]], batch_size: int) -> None:
    """Before anything is measured: can the budget be met for each selection of layers, and is it one?

    Raises:
        LanceError: if it is below rank 1 in every mode, naming the least one, or holds the plain inputs.
    """
    for layers in selections:
        least = sum(factored_activation_bytes(layer, batch_size, (1,) * len(layer.modes)) for layer in layers)
        whole = sum(bp_activation_bytes(layer, batch_size) for layer in layers)
        if budget < least:
            raise LanceError(
                f"--memory-budget of {method}: expected at least {least}B (rank 1 in every mode of the"
                f" {len(layers)} layers, batch size {batch_size}), found {budget}B; give more, or train fewer"
                " layers"
            )
        if budget >= whole:
            raise LanceError(
                f"--memory-budget of {method}: the inputs of the {len(layers)} layers fit as they are ({whole}B"
                f" at batch size {batch_size}, budget {budget}B); train with the method bp, or give less"
            )


def plan_budget(method: str, budget: int, search: SearchResult) -> BudgetPlan:
    """Choose the ranks of a method."""
    chosen = choose([layer.candidates for layer in search.layers], budget)
    uniform = [layer.uniform for layer in search.layers]
    # Only rounding up to cells can make the single energy the better one.
    best = min(chosen, uniform, key=total_error)
    return BudgetPlan(method, budget, search, tuple(best))


def choose(frontiers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate of each layer: the least sum of errors with a sum of bytes of at most `budget`.

    Exact with sizes rounded up to whole cells of `4 ceil(budget / 4 / 65536)` bytes; so never over budget.

    Args:
        frontiers: for each layer its candidates, the cheapest first.

    Raises:
        LanceError: if not even the cheapest ones fit, naming what they need.
    """
    least = sum(candidates[0].nbytes for candidates in frontiers)
    if least > budget:
        raise LanceError(f"memory budget: expected at least {least}B, found {budget}B; give more")
    cell = VALUE_BYTES * -(-budget // (VALUE_BYTES * CELLS))
    cells = budget // cell
    error = np.zeros(cells + 1)  # error[c]: the least one of the layers so far within c cells
    picks = []
    for candidates in frontiers:
        error, pick = _add_layer(error, [(-(-one.nbytes // cell), one.error) for one in candidates])
        picks.append(pick)
    if math.isinf(error[cells]):
        return [candidates[0] for candidates in frontiers]  # they fit, but not rounded up
    chosen = []
    for candidates, pick in zip(reversed(frontiers), reversed(picks), strict=True):
        one = candidates[pick[cells]]
        cells -= -(-one.nbytes // cell)
        chosen.append(one)
    return chosen[::-1]


def _add_layer(
    before: NDArray[np.float64], candidates: Sequence[tuple[int, float]]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The least error within each number of cells with one more layer, and the candidate that gives it."""
    best = np.full_like(before, np.inf)
    pick = np.zeros(len(before), np.int32)
    for index, (cost, error) in enumerate(candidates):
        if cost >= len(before):
            break
        total = before[: len(before) - cost] + error
        better = total < best[cost:]
        best[cost:][better] = total[better]
        pick[cost:][better] = index
    return best, pick


def total_error(candidates: Sequence[Candidate]) -> float:
    """The sum of their errors."""
    return math.fsum(candidate.error for candidate in candidates)


def total_bytes(candidates: Sequence[Candidate]) -> int:
    """The sum of their bytes."""
    return sum(candidate.nbytes for candidate in candidates)
