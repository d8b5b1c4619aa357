"""What the ways to a compressed weight gradient have in common: a layer's context, and the steps of a form."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import onnx_ir as ir

from lance_edge.manifest import Mode, Schedule
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.linear import LinearGeometry

Geometry = ConvGeometry | LinearGeometry
G = TypeVar("G", ConvGeometry, LinearGeometry)


@dataclass
class LayerContext:
    """One trainable layer while its weight gradient is being written.

    `projections` are graph inputs by mode: U0 (rows of this micro-batch, `[N, r0]`; absent without a batch
    mode), and for the modes i of the layer's input `[N, n1, ...]` Ui `[n_i, r_i]`; in patch mode also absent
    without a mode of positions, and U1 `[g, D, r1]` with more than one group.  `core` is one where a codec
    gives it, `[r1, r0, ...]`.  `ranks` are empty where they differ from step to step; with `takes_any_rank`
    they only decide between ways to compute, and the graphs serve any others.  `statistics` collects
    the values that are summed over micro-batches, `activation` is what a codec compresses.
    """

    name: str
    ranks: tuple[int, ...]
    projections: dict[int, ir.Value]
    schedule: Schedule = "one pass"
    mode: Mode = "channel"
    core: ir.Value | None = None
    takes_any_rank: bool = False
    statistics: list[ir.Value] = field(default_factory=list)
    activation: ir.Value | None = None

    def statistic(self, value: ir.Value, suffix: str) -> ir.Value:
        """Declare that a value is summed over the micro-batches, as `<layer>/<suffix>`."""
        value.name = f"{self.name}/{suffix}"
        self.statistics.append(value)
        return value


@dataclass(frozen=True)
class Form(Generic[G]):
    """The linear steps from input and output gradient of a layer to its weight gradient.

    `q` counts spatial components (of maps, or of tokens), `.` the channels that a form keeps outside.

    Attributes:
        coefficients: the input on the bases of all modes but the batch, with the samples in the middle.
        core: the core that a codec gives, as coefficients of r0 samples.
        project: the output gradient on what the coefficients have of space, samples in the middle.
        contribute: the sum over n samples (or components) of coefficients times that, as small as can be.
        expand: once for a batch, from there to the weight's shape.
    """

    coefficients: Callable[[Emit, LayerContext, G, ir.Value], ir.Value]
    core: Callable[[Emit, LayerContext, ir.Value], ir.Value]
    project: Callable[[Emit, LayerContext, G, ir.Value], ir.Value]
    contribute: Callable[[Emit, LayerContext, G, ir.Value, ir.Value], ir.Value]
    expand: Callable[[Emit, LayerContext, G, ir.Value], ir.Value]
