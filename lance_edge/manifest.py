"""What a package says about itself: `manifest.json`, the plan that the device applies.

The host decides everything (which layers train, their ranks, which tensors cross from forward to
backward); the device feeds graphs by tensor name as written here and in `docs/artifact.md`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lance_edge.errors import ArtifactError
from lance_edge.input_spec import ArrayInput, Preprocessing, Split
from lance_edge.names import BATCH_DIM, forward_role, projection_name

SCHEMA_VERSION = 2

# How the micro-batches of a batch go through forward and backward: see `Variant`.
Schedule = Literal["one pass", "two passes", "by layer"]

# Which modes an activation has, and which of them continual learning protects: see `Layer.modes_in`.
Mode = Literal["channel", "patch"]
MODES: tuple[Mode, ...] = ("channel", "patch")

METHOD_NAMES = ("bp", "lance", "asi", "hosvd")


def batch_multiple(dim: str) -> int | None:
    """4 for `4*N`, 1 for `N`; `None` for what is no multiple of the micro-batch."""
    factor, star, name = dim.rpartition("*")
    if name != BATCH_DIM or (star and not (factor.isdecimal() and len(factor) < 10)):
        return None
    return int(factor) if star else 1


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor.  A `str` in `shape` is the micro-batch dimension, `"N"`, or a multiple of it, `"4*N"`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def sizes(self, samples: int) -> tuple[int, ...]:
        """The shape when the micro-batch has `samples` samples."""
        return tuple(
            dim if isinstance(dim, int) else samples * (batch_multiple(dim) or 1) for dim in self.shape
        )

    def nbytes(self, samples: int) -> int:
        """Bytes when the micro-batch has `samples` samples; masks are kept as one bit a value."""
        values = math.prod(self.sizes(samples))
        bits = {"float32": 32, "int64": 64, "int32": 32, "uint8": 8, "bool": 1}[self.dtype]
        return -(-values * bits // 8)


@dataclass(frozen=True)
class Layer:
    """A trainable layer: geometry without the batch dimension.

    Of a convolution `input_shape` is `[C, H, W]`, `output_shape` `[O, H', W']`, `padding` `[top, left, bottom,
    right]`; a 1-D one has the height 1 here, while its parameter has the shape `[O, C / groups, k]`.  Of a
    linear layer they are `[T, F]` and `[T, O]` (T tokens or positions), or `[F]` and `[O]`; `weight_shape` is
    `[O, F]`, and what describes a kernel is empty.
    """

    name: str
    weight: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_linear(self) -> bool:
        """Whether its weight is a matrix."""
        return len(self.weight_shape) == 2

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of its input in channel mode."""
        return self.modes_in("channel")

    def modes_in(self, mode: str) -> tuple[str, ...]:
        """The modes of its input, in the order of ranks and projections; a linear layer has the same in both.

        In patch mode the input of a convolution is `[B, D, L]`: L output positions, each of which reads the
        D = C/groups k_h k_w values of one filter (for each group).
        """
        if not self.is_linear:
            return (
                ("batch", "inputs", "positions")
                if mode == "patch"
                else ("batch", "channels", "height", "width")
            )
        return ("batch", "tokens", "features") if len(self.input_shape) == 2 else ("batch", "features")


@dataclass(frozen=True)
class LayerPlan:
    """How one layer trains in one variant, and what that costs at the package's batch size.

    `ranks` and `energy_kept` have one entry per mode of `Layer.modes_in` and are empty for plain
    backpropagation.  `activation_bytes` is the paper's figure: the input, or core and factors.
    `forward_macs` and `weight_gradient_macs` are the paper's multiply-adds.  `factor_bytes` are those of
    `activation_bytes` that projections take, where they are not all but the core `[r0, r1, ...]`.
    """

    layer: str
    ranks: tuple[int, ...]
    energy_kept: tuple[float, ...]
    activation_bytes: int
    forward_macs: int
    weight_gradient_macs: int
    factor_bytes: int | None = None

    @property
    def bytes_of_factors(self) -> int:
        """Projections or factors U, in bytes."""
        if self.factor_bytes is not None:
            return self.factor_bytes
        return self.activation_bytes - 4 * math.prod(self.ranks) if self.ranks else 0


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, the layers that it trains, and the tensors that pass between its graphs.

    `graphs` maps a role to the members whose bytes, one after the other, are its graph: `prefix`, `forward`,
    `backward`, `predict`, `inputs` (of the trained layers), `prepare` where something depends on the parameters
    alone, and `gradient` where gradients are computed from accumulated statistics.  `graph_macs` is the exact
    multiply-add count of each graph for one batch.  `boundary` are the prefix's outputs.  `saved` are the
    tensors that backward reads from forward or from the prefix.  `statistics` are summed over the
    micro-batches of a batch.  `batch_projections` are inputs of which a micro-batch is fed its own rows;
    `projections` are fed whole.

    `schedule`: in "one pass" backward follows forward in every micro-batch, so `saved` lives for one of
    them; in "two passes" all forwards come first, and backward reads the complete statistics of forward.
    "by layer": the whole batch goes from one trainable layer to the next, in graphs `forward-1`,
    `forward-2`, ...; what is in `activations` is compressed by the method's codec as soon as it is there, and
    backward is fed cores and factors.

    `energy` is the threshold ε that gave the ranks, or that gives them anew at every step; `budget_bytes` the
    activation memory that they were chosen for instead.  `takes_any_rank`: its graphs serve any ranks of the
    modes that they compress and any number of classes, so a board can make the next task's package of them.
    `prefix_sha256` is the same for the same prefix, however its package divides it into members: what is kept
    of its outputs serves other packages too.  `None` where packages did not say, or there is no prefix.
    """

    method: str
    energy: float | None
    schedule: Schedule
    graphs: dict[str, tuple[str, ...]]
    parameters: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    boundary: tuple[TensorSpec, ...]
    activations: tuple[TensorSpec, ...]
    saved: tuple[TensorSpec, ...]
    statistics: tuple[TensorSpec, ...]
    batch_projections: tuple[str, ...]
    projections: tuple[str, ...]
    graph_macs: dict[str, int]
    budget_bytes: int | None = None
    takes_any_rank: bool = False
    prefix_sha256: str | None = None

    @property
    def activation_bytes(self) -> int:
        """The paper's activation memory at the package's batch size, all trainable layers."""
        return sum(plan.activation_bytes for plan in self.layers)

    @property
    def projection_ranks(self) -> dict[str, int]:
        """Columns of each projection that this variant is fed.

        The package stores every projection once, at the largest rank that any variant uses; a smaller one
        is its leading columns.
        """
        ranks = {projection_name(plan.layer, i): r for plan in self.layers for i, r in enumerate(plan.ranks)}
        return {name: ranks[name] for name in (*self.projections, *self.batch_projections)}

    @property
    def forward_roles(self) -> tuple[str, ...]:
        """The graphs of forward, in the order in which they run."""
        parts = [forward_role(part) for part in range(1, len(self.graphs) + 1)]
        return tuple(role for role in parts if role in self.graphs) or ("forward",)

    @property
    def factor_bytes(self) -> int:
        """Projections or factors U of all layers, in bytes."""
        return sum(plan.bytes_of_factors for plan in self.layers)

    def saved_bytes(self, micro_batch: int, batch_size: int) -> int:
        """The most that is alive between forward and backward: saved tensors, statistics, cores and factors.

        For a method whose ranks differ from step to step this is the estimate of `LayerPlan`.
        """
        alive = kept_bytes(self.schedule, self.saved, self.statistics, micro_batch, batch_size)
        return alive + (self.activation_bytes if self.schedule == "by layer" else self.factor_bytes)


def kept_bytes(
    schedule: Schedule,
    saved: Sequence[TensorSpec],
    statistics: Sequence[TensorSpec],
    micro_batch: int,
    batch_size: int,
) -> int:
    """The most of saved tensors and statistics that is alive between forward and backward of a batch."""
    whole, rest = divmod(batch_size, micro_batch)
    parts = [micro_batch] * whole + [rest] * (rest > 0)
    kept = sum(spec.nbytes(samples) for samples in parts for spec in saved)
    if schedule == "one pass":
        kept = sum(spec.nbytes(micro_batch) for spec in saved)
    return kept + sum(spec.nbytes(micro_batch) for spec in statistics)


@dataclass(frozen=True)
class Task:
    """An earlier task of the package: its classes, and its head by the network's own parameter names.

    The arrays of the head are `head_name(name, parameter)` in `weights.npz`.
    """

    name: str
    classes: tuple[str, ...]
    head: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FrozenLayer:
    """A layer that an earlier task trained and this one does not, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Member:
    """A file of the package."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The package.

    `parameters` and `layers` are all that any variant trains, `members` every other file of the tar.
    `variants` differ in method or in the number of layers; the first one's method is the default.

    `task` is what it trains, `head` the parameters that each task has of its own, `tasks` what was learned
    before, in order.  Layers in `protected` have a subspace in `memory.npz` that training must not touch: no
    weight decay, no biases; `frozen` are those with no subspace left.
    """

    schema_version: int
    created_by: str
    model: str
    weights_source: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing | ArrayInput
    split: Split
    seed: int
    mode: Mode
    energy: float
    batch_size: int
    calibration_batches: int
    parameters: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    variants: tuple[Variant, ...]
    members: tuple[Member, ...]
    task: str = ""
    head: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    protected: tuple[str, ...] = ()
    frozen: tuple[FrozenLayer, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, the default one first."""
        return tuple(dict.fromkeys(variant.method for variant in self.variants))

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Numbers of trained layers to choose from, ascending."""
        return tuple(sorted({len(variant.layers) for variant in self.variants}))

    def variant(self, method: str | None = None, layers: int | None = None) -> Variant:
        """The variant of a method (by default the first in the package) with so many layers.

        By default that method's largest number of layers: what `--layers K` of the calibration asked for.

        Raises:
            ArtifactError: if the package has no such variant.
        """
        chosen = self.methods[0] if method is None else method
        by_count = {len(variant.layers): variant for variant in self.variants if variant.method == chosen}
        if not by_count:
            again = f", or calibrate again with --methods {','.join([*self.methods, chosen])}"
            raise ArtifactError(
                f"this package holds the methods {', '.join(self.methods)}, not {chosen}; choose one of"
                f" them{again if chosen in METHOD_NAMES else ''}"
            )
        count = max(by_count) if layers is None else layers
        if count not in by_count:
            counts = ", ".join(map(str, sorted(by_count)))
            raise ArtifactError(
                f"this package holds method {chosen} with --layers {counts}, not {count}; choose one of these,"
                f" or calibrate again with --layers {count}"
            )
        return by_count[count]

    def with_layers(self, count: int) -> "Manifest":
        """The package as it would be with this number of layers alone; members stay as they are.

        Raises:
            ArtifactError: if no variant has so many layers.
        """
        variants = tuple(variant for variant in self.variants if len(variant.layers) == count)
        if not variants:
            self.variant(None, count)  # says which there are
        layers = {plan.layer for variant in variants for plan in variant.layers}
        parameters = {name for variant in variants for name in variant.parameters}
        return replace(
            self,
            variants=variants,
            layers=tuple(layer for layer in self.layers if layer.name in layers),
            parameters=tuple(spec for spec in self.parameters if spec.name in parameters),
        )
