"""What a package says about itself: `manifest.json`, the plan that the device applies.

The host decides everything (which layers train, their ranks, which tensors cross from forward to
backward); the device feeds graphs by tensor name as written here and in `docs/artifact.md`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lance_edge.errors import ArtifactError
from lance_edge.records import RecordError, from_json, to_json

SCHEMA_VERSION = 1

MAX_SIDE = 1 << 14  # pixels of an image that a network reads: more would not fit into any board's memory
MAX_VALUES = 1 << 28  # of an array, for the same reason

# How the micro-batches of a batch go through forward and backward: see `Variant`.
Schedule = Literal["one pass", "two passes", "by layer"]

METHOD_NAMES = ("bp", "lance", "asi", "hosvd")

# The dimension of a tensor that counts the samples of a micro-batch; a multiple of it is written "4*N".
BATCH_DIM = "N"

# Names with a fixed meaning in the graphs' signatures.
IMAGES = "images"  # float32 [N, 3, R, R], or arrays [N, ...], input of the prefix
LABELS = "labels"  # int64 [N], input of forward (and of backward, where it reads them)
SCALE = "scale"  # float32 [], input of backward: 1 / batch size, or 1 / the sum of the samples' weights
# Of a sample of class c the target is `off`, plus `on[c]` at c: both float32 [classes], inputs of forward and
# backward.  Ones and zeros are plain cross-entropy; class weights and label smoothing are other numbers.
TARGET_ON, TARGET_OFF = "target/on", "target/off"
# Of each sample the seed of what is dropped, 0 to 2^31 - 2, or -1 for nothing: int64 [N], input of forward and
# backward of packages that drop (`--dropout`).
DROPOUT_SEEDS = "dropout_seeds"
LOSS = "loss"  # float32 [], output of forward: cross-entropy summed over the N samples
LOGITS = "logits"  # float32 [N, classes], output of forward and of predict

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")  # of `Preprocessing`, as pillow has them

# Metadata of an exported ONNX model, both JSON: the class names, and the fields of `Preprocessing`.
CLASSES_KEY = "classes"
PREPROCESSING_KEY = "preprocessing"

WEIGHTS_MEMBER = "weights.npz"
PROJECTIONS_MEMBER = "projections.npz"
SPECTRA_MEMBER = "spectra.npz"


def gradient_name(parameter: str) -> str:
    """The tensor that holds the gradient of a trainable parameter."""
    return f"{parameter}/grad"


def projection_name(layer: str, mode: int) -> str:
    """The projection of one mode of a layer's input: `[n_mode, r_mode]`, orthonormal columns."""
    return f"{layer}/U{mode}"


def core_name(layer: str) -> str:
    """The core that a codec makes of a layer's input, as backward is fed it: `[r1, r0, ...]`."""
    return f"{layer}/G"


def activation_name(layer: str) -> str:
    """A layer's input where a codec compresses it: `[N, C, H, W]`, `[N, T, F]` or `[N, F]`."""
    return f"{layer}/A"


def forward_role(part: int) -> str:
    """The graph of a part of forward, from 1, where it runs layer by layer."""
    return f"forward-{part}"


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input; the same for calibration, training and prediction.

    EXIF-oriented, RGB (or grey, where `mean` and `std` have one entry), resized to `resize` on the short
    side, centre crop `resolution`, then `(x / 255 - mean) / std` per channel.
    """

    resolution: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one prepared image, `[channels, R, R]`."""
        return (len(self.mean), self.resolution, self.resolution)


@dataclass(frozen=True)
class ArrayInput:
    """Float32 arrays of this shape, without the batch, go to the network unchanged."""

    shape: tuple[int, ...]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one array."""
        return self.shape


InputSpec = Preprocessing | ArrayInput


@dataclass(frozen=True)
class Split:
    """How class folders without their own `train/` and `test/` are divided (see `datasets.py`).

    `validation_fraction` is taken from the training part; `best.npz` is chosen on it.
    """

    seed: int
    test_fraction: float
    validation_fraction: float


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
        """The modes of its input, in the order of ranks and projections."""
        if not self.is_linear:
            return ("batch", "channels", "height", "width")
        return ("batch", "tokens", "features") if len(self.input_shape) == 2 else ("batch", "features")


@dataclass(frozen=True)
class LayerPlan:
    """How one layer trains in one variant, and what that costs at the package's batch size.

    `ranks` and `energy_kept` have one entry per mode of `Layer.modes` and are empty for plain
    backpropagation.  `activation_bytes` is the paper's figure: the input, or core and factors.
    `forward_macs` and `weight_gradient_macs` are the paper's multiply-adds.
    """

    layer: str
    ranks: tuple[int, ...]
    energy_kept: tuple[float, ...]
    activation_bytes: int
    forward_macs: int
    weight_gradient_macs: int


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, the layers that it trains, and the tensors that pass between its graphs.

    `graphs` maps a role to the members whose bytes, one after the other, are its graph: `prefix`, `forward`,
    `backward`, `predict`, `prepare` where something depends on the parameters alone, and `gradient` where
    gradients are computed from accumulated statistics.  `graph_macs` is the exact multiply-add count of each
    graph for one batch.  `boundary` are the prefix's outputs.  `saved` are the tensors that backward reads
    from forward or from the prefix.  `statistics` are summed over the micro-batches of a batch.
    `batch_projections` are inputs of which a micro-batch is fed its own rows; `projections` are fed whole.

    `schedule`: in "one pass" backward follows forward in every micro-batch, so `saved` lives for one of
    them; in "two passes" all forwards come first, and backward reads the complete statistics of forward.
    "by layer": the whole batch goes from one trainable layer to the next, in graphs `forward-1`,
    `forward-2`, ...; what is in `activations` is compressed by the method's codec as soon as it is there, and
    backward is fed cores and factors.

    `energy` is the threshold ε that gave the ranks, or that gives them anew at every step; `budget_bytes` the
    activation memory that they were chosen for instead.
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
        cores = sum(4 * math.prod(plan.ranks) for plan in self.layers if plan.ranks)
        return sum(plan.activation_bytes for plan in self.layers if plan.ranks) - cores

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
    """

    schema_version: int
    created_by: str
    model: str
    weights_source: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing | ArrayInput
    split: Split
    seed: int
    mode: str
    energy: float
    batch_size: int
    calibration_batches: int
    parameters: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    variants: tuple[Variant, ...]
    members: tuple[Member, ...]

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


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: sorted nowhere, indented by one, the same for the same manifest."""
    return (json.dumps(to_json(manifest), indent=1, ensure_ascii=False) + "\n").encode()


def decode(data: bytes, where: str) -> Manifest:
    """Read and check `manifest.json`; `where` names the package in messages.

    Raises:
        ArtifactError: for anything but a well-formed manifest of this schema.
    """
    try:
        value: Any = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: manifest.json is not JSON ({error}); copy the package again") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(_schema_message(where, version))
    try:
        manifest = from_json(Manifest, value)
        _check_meaning(manifest)
        return manifest
    except RecordError as error:
        raise ArtifactError(
            f"{where}: manifest.json does not fit schema {SCHEMA_VERSION}: {error}; rebuild the package"
        ) from None


def _check_meaning(manifest: Manifest) -> None:
    """What the types leave open and every reader relies on."""
    parameters = {spec.name for spec in manifest.parameters}
    layers = {layer.name for layer in manifest.layers}
    rules = {
        "two or more classes": len(manifest.classes) >= 2,
        "a batch size of 1 or more": manifest.batch_size >= 1,
        **_input_rules(manifest.preprocessing),
        "fractions of the split from 0 to below 1": all(
            0 <= fraction < 1 for fraction in (manifest.split.test_fraction, manifest.split.validation_fraction)
        ),
        "one variant or more": bool(manifest.variants),
        "fixed shapes of parameters": all(
            isinstance(d, int) for spec in manifest.parameters for d in spec.shape
        ),
        "shapes of numbers and multiples of N": all(
            isinstance(dim, int) or batch_multiple(dim)
            for variant in manifest.variants
            for spec in (*variant.boundary, *variant.saved, *variant.statistics)
            for dim in spec.shape
        ),
        "energies above 0 and at most 1": all(
            0 < variant.energy <= 1 for variant in manifest.variants if variant.energy is not None
        ),
        "parameters for all variants": all(parameters.issuperset(v.parameters) for v in manifest.variants),
        "ranks for all projections": all(
            {projection_name(plan.layer, i) for plan in v.layers for i in range(len(plan.ranks))}.issuperset(
                (*v.projections, *v.batch_projections)
            )
            for v in manifest.variants
        ),
        "an activation for each layer of a variant that goes by layer": all(
            len(v.activations) == len(v.layers) for v in manifest.variants if v.schedule == "by layer"
        ),
        "layers for all variants": all(plan.layer in layers for v in manifest.variants for plan in v.layers),
        "variants that differ in method or number of layers": len(manifest.variants)
        == len({(v.method, len(v.layers)) for v in manifest.variants}),
        "graphs of one member or more": all(
            names for variant in manifest.variants for names in variant.graphs.values()
        ),
    }
    broken = [expected for expected, holds in rules.items() if not holds]
    if broken:
        raise RecordError(f"expected {', '.join(broken)}")


def broken_rules(steps: InputSpec) -> list[str]:
    """What is wrong with an input's description, each as what was expected; nothing if it is sound."""
    return [expected for expected, holds in _input_rules(steps).items() if not holds]


def _input_rules(steps: InputSpec) -> dict[str, bool]:
    if isinstance(steps, ArrayInput):
        is_sound = bool(steps.shape) and min(steps.shape) >= 1
        return {
            "arrays of positive size": is_sound,
            f"arrays of at most {MAX_VALUES} values": not is_sound or math.prod(steps.shape) <= MAX_VALUES,
        }
    return {
        "a resolution of 1 or more": min(steps.resolution, steps.resize) >= 1,
        f"a resolution of at most {MAX_SIDE}": max(steps.resolution, steps.resize) <= MAX_SIDE,
        "a mean and a positive std of 1 or 3 channels": len(steps.mean) == len(steps.std)
        and len(steps.mean) in (1, 3)
        and min(steps.std) > 0
        and all(map(math.isfinite, (*steps.mean, *steps.std))),
        f"an interpolation of {', '.join(INTERPOLATIONS)}": steps.interpolation in INTERPOLATIONS,
    }


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _schema_message(where: str, version: Any) -> str:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return (
            f"{where}: schema {version}, this runtime reads {SCHEMA_VERSION};"
            " install a newer lance-edge here, or rebuild the package with the version installed here"
        )
    return f"{where}: expected schema {SCHEMA_VERSION}, found {version!r}; rebuild the package with lance-host"
