"""The ranks of every variant of a package: by one energy, or the best within a memory budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lance_edge.images import Part, load_batch
from lance_edge.input_spec import InputSpec
from lance_edge.manifest import Layer
from lance_edge.protected_spectra import ranks_by_mode
from lance_edge.spectrum import ModeSpectrum
from lance_host.budget import plan_budget
from lance_host.hosvd import Spectrum
from lance_host.methods import METHODS
from lance_host.perplexity import SEARCHES, BatchTensors, Spectra, Task
from lance_host.ranks import Ranks, ranks_by_energy
from lance_host.request import Feedback, Request
from lance_host.search_tables import budget_table
from lance_host.taps import batch_tensors

# (method, number of layers) -> ranks by layer; without an entry nothing is compressed.
RankChoice = dict[tuple[str, int], Ranks]


@dataclass(frozen=True)
class GradientBatches:
    """Batches as the perplexity search takes them; may be read more than once.

    `order` has the indices of each batch's training images, `[batches, B]`.
    """

    network: torch.nn.Module
    layers: Sequence[Layer]
    part: Part
    preprocessing: InputSpec
    order: NDArray[np.int64]

    def __iter__(self) -> Iterator[BatchTensors]:
        """Inputs and output gradients of all layers, a batch at a time."""
        for indices in self.order:
            images = load_batch(self.part, indices, self.preprocessing)
            yield batch_tensors(self.network, self.layers, images, self.part.labels[indices])

    def counted(self, name: str, feedback: Feedback) -> Iterator[BatchTensors]:
        """The same, with progress under a name."""
        for number, tensors in enumerate(self, start=1):
            yield tensors
            feedback.progress(name, number, len(self.order))


def energy_of(request: Request, method: str) -> float | None:
    """The threshold ε by which a method's ranks are chosen; `None` within a budget, or without ranks."""
    kind = METHODS[method]
    if method in request.budgets:
        return None
    return request.energy if kind.fixes_ranks else kind.energy


def choose_ranks(
    request: Request,
    selections: Sequence[Sequence[Layer]],
    spectra: Mapping[str, Sequence[ModeSpectrum]],
    batches: GradientBatches,
    feedback: Feedback,
) -> RankChoice:
    """The ranks of each method that compresses, for each selection of layers.

    Of a method whose ranks differ from step to step they are an estimate, from the calibration's spectra.

    Args:
        selections: ascending; the last one holds all layers.
        batches: read for methods with a budget only.
    """
    selections = [layers for layers in selections if layers]
    choice: RankChoice = {}
    for method in request.methods if selections else ():
        energy = energy_of(request, method)
        if method in request.budgets:
            task = Task(tuple(map(tuple, selections)), batches.order.shape[1], request.budgets[method])
            results = SEARCHES[method](
                task, _of_channel_mode(spectra), batches.counted(f"gradients of {method}", feedback)
            )
            plans = [plan_budget(method, task.budget, result) for result in results]
            feedback.say(budget_table(plans))
            choice |= {(method, len(plan.ranks)): plan.ranks for plan in plans}
        elif energy is not None:
            values = {name: [mode.eigenvalues for mode in modes] for name, modes in spectra.items()}
            for layers in selections:
                own = {layer.name: values[layer.name] for layer in layers}
                choice[method, len(layers)] = (
                    ranks_by_mode(layers, request.mode, batches.order.shape[1], spectra, energy)
                    if request.mode == "patch"
                    else ranks_by_energy(own, energy)
                )
    return choice


def _of_channel_mode(spectra: Mapping[str, Sequence[ModeSpectrum]]) -> Spectra:
    """The same: only there are budgets."""
    return {name: [mode for mode in modes if isinstance(mode, Spectrum)] for name, modes in spectra.items()}
