"""The perplexity search: what each choice of ranks costs a layer, in bytes and in gradient error.

The perplexity of a layer at some ranks is the Frobenius distance between its exact weight gradient and
the one from the compressed activation, averaged over calibration batches with real activations and real
output gradients.  `budget.py` chooses among the candidates.

Sources: Nguyen et al., "Beyond Low-rank Decomposition", ICML 2025 (one energy per layer, for ASI); for LANCE
the ranks of all modes are free, since `gradient_error.py` has a whole grid of them at little cost.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lance_edge.energy import rank_for_energy
from lance_edge.manifest import Layer
from lance_host.error_table import Candidate, ErrorTable, frontier
from lance_host.gradient_error import Grids
from lance_host.hosvd import ModeCovariances, Spectrum
from lance_host.ranks import Ranks, energy_for_budget, ranks_by_energy

Spectra = Mapping[str, Sequence[Spectrum]]
# Layer name -> its input [B, *input_shape] and its output gradient [B, *output_shape].
BatchTensors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

# ASI's grid of energies; the paper looks at 0.4 to 0.9.
# fmt: off
ENERGIES = (
    0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.98,
)
# fmt: on
STEPS = 14  # ranks to look at in a long mode, in geometric steps: each is about 1.5 times the one before
SPATIAL_STEPS = 5  # in height and width


@dataclass(frozen=True)
class LayerChoices:
    """What one layer can choose from.

    Attributes:
        candidates: each better than all cheaper ones, the cheapest first.
        uniform: what one energy for all layers gives it at the same budget.
        gradient_norm: the mean norm of the exact weight gradient.
    """

    layer: str
    candidates: tuple[Candidate, ...]
    uniform: Candidate
    gradient_norm: float


# --- searches: one function a method --------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """What the layers of one selection can choose from, and the single `energy` (ε) that fills its budget."""

    energy: float
    layers: tuple[LayerChoices, ...]


@dataclass(frozen=True)
class Task:
    """What to search for: each selection of layers gets the whole `budget` (bytes) for itself.

    The last of `selections` holds all layers of the others.
    """

    selections: tuple[tuple[Layer, ...], ...]
    batch_size: int
    budget: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers."""
        return self.selections[-1]


# `(task, calibrated spectra, batches) -> a result for each selection`.
Search = Callable[[Task, Spectra, Iterable[BatchTensors]], tuple[SearchResult, ...]]


def search_lance(task: Task, spectra: Spectra, batches: Iterable[BatchTensors]) -> tuple[SearchResult, ...]:
    """Fixed calibrated projections; the ranks of the modes are free of each other.

    Raises:
        ValueError: if the budget does not hold rank 1 everywhere, or there is no batch.
    """
    uniforms = _uniforms(task, spectra)
    tables = {
        layer.name: ErrorTable(layer, task.batch_size, _free_grids(layer, task.batch_size, uniforms))
        for layer in task.layers
    }
    for tensors in batches:
        for name, table in tables.items():
            table.add(*tensors[name], spectra[name])
    return _results(task, uniforms, tables, ErrorTable.frontier)


def search_asi(task: Task, _: Spectra, batches: Iterable[BatchTensors]) -> tuple[SearchResult, ...]:
    """Projections of each batch's own; one energy per layer, whose ranks are those of the first batch.

    Raises:
        ValueError: if the budget does not hold rank 1 everywhere, or there is no batch.
    """
    uniforms: list[_Uniform] = []
    tables: dict[str, ErrorTable] = {}
    ladders: dict[str, list[tuple[int, ...]]] = {}
    for tensors in batches:
        own = {layer.name: _own_spectra(tensors[layer.name][0]) for layer in task.layers}
        if not tables:
            uniforms = _uniforms(task, own)
            for layer in task.layers:
                ladders[layer.name] = _ranks_of_energies(own[layer.name], _uniform_ranks(layer, uniforms))
                grids = tuple(tuple(sorted(set(mode))) for mode in zip(*ladders[layer.name], strict=True))
                tables[layer.name] = ErrorTable(layer, task.batch_size, grids)
        for name, table in tables.items():
            table.add(*tensors[name], own[name])

    def candidates(table: ErrorTable) -> list[Candidate]:
        return frontier([table.candidate(ranks) for ranks in ladders[table.layer.name]])

    return _results(task, uniforms, tables, candidates)


SEARCHES: dict[str, Search] = {"lance": search_lance, "asi": search_asi}


@dataclass(frozen=True)
class _Uniform:
    """The single energy of a selection, and its ranks."""

    energy: float
    ranks: Ranks


def _uniforms(task: Task, spectra: Spectra) -> list[_Uniform]:
    found = []
    for layers in task.selections:
        eigenvalues = {one.name: [mode.eigenvalues for mode in spectra[one.name]] for one in layers}
        energy = energy_for_budget(layers, eigenvalues, task.batch_size, task.budget)
        found.append(_Uniform(energy, ranks_by_energy(eigenvalues, energy)))
    return found


def _uniform_ranks(layer: Layer, uniforms: Sequence[_Uniform]) -> list[tuple[int, ...]]:
    return [one.ranks[layer.name] for one in uniforms if layer.name in one.ranks]


def _results(
    task: Task,
    uniforms: Sequence[_Uniform],
    tables: Mapping[str, ErrorTable],
    candidates: Callable[[ErrorTable], Sequence[Candidate]],
) -> tuple[SearchResult, ...]:
    if not tables or not all(table.batches for table in tables.values()):
        raise ValueError("perplexity search: expected one batch or more, found none")
    options = {name: tuple(candidates(table)) for name, table in tables.items()}
    results = []
    for layers, uniform in zip(task.selections, uniforms, strict=True):
        choices = (
            LayerChoices(
                layer=layer.name,
                candidates=options[layer.name],
                uniform=tables[layer.name].candidate(uniform.ranks[layer.name]),
                gradient_norm=tables[layer.name].gradient_norm,
            )
            for layer in layers
        )
        results.append(SearchResult(uniform.energy, tuple(choices)))
    return tuple(results)


def _own_spectra(x: torch.Tensor) -> tuple[Spectrum, ...]:
    covariances = ModeCovariances(tuple(x.shape))
    covariances.add(x.numpy())
    return covariances.spectra()


def _ranks_of_energies(spectra: Sequence[Spectrum], more: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Rank 1 everywhere, the ranks of each energy of the grid, and `more`."""
    ranks = {tuple(rank_for_energy(one.eigenvalues, energy) for one in spectra) for energy in ENERGIES}
    return sorted({(1,) * len(spectra), *ranks, *more})


def _free_grids(layer: Layer, batch_size: int, uniforms: Sequence[_Uniform]) -> Grids:
    """Ranks to look at in each mode; all of them in a channel mode without groups, where they are free."""
    steps = {"batch": STEPS, "tokens": STEPS, "height": SPATIAL_STEPS, "width": SPATIAL_STEPS}
    if layer.groups > 1:
        steps["channels"] = STEPS
    sizes = zip(layer.modes, (batch_size, *layer.input_shape), strict=True)
    grids = [_ladder(size, steps.get(mode, size)) for mode, size in sizes]
    more = zip(*_uniform_ranks(layer, uniforms), strict=True)
    return tuple(tuple(sorted({*grid, *ranks})) for grid, ranks in zip(grids, more, strict=True))


def _ladder(size: int, steps: int) -> tuple[int, ...]:
    """At most `steps` ranks from 1 to `size`, in geometric steps where there are fewer steps than ranks."""
    if steps >= size:
        return tuple(range(1, size + 1))
    return tuple(sorted({round(size ** (step / (steps - 1))) for step in range(steps)}))
