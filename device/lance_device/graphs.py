"""What a package gives to run: graphs, starting weights and projections, checked against the manifest."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lance_device.session import Array, Graph
from lance_edge.bundle import ArrayReader, Bundle
from lance_edge.checkpoints import trained_shapes
from lance_edge.errors import ArtifactError
from lance_edge.manifest import TensorSpec, Variant
from lance_edge.names import (
    BATCH_DIM,
    CLASSES_DIM,
    IMAGES,
    LABELS,
    LOGITS,
    LOSS,
    PROJECTIONS_MEMBER,
    WEIGHTS_MEMBER,
    activation_name,
    gradient_name,
)

Float = NDArray[np.float32]

PREFIX_IMAGES = 4  # that pass the prefix at a time, in all lanes together


def load_prefix(bundle: Bundle, variant: Variant, threads: int, micro_batch: int) -> Graph:
    """The frozen part, for micro-batches of that many images, which pass it side by side.

    There are no more lanes than images in all of them; where there are more threads, each lane has several.

    Raises:
        ArtifactError: if the package does not have it or it cannot be loaded.
    """
    return load_graph(bundle, variant, "prefix", threads, lanes=min(threads, micro_batch, PREFIX_IMAGES))


def load_graph(bundle: Bundle, variant: Variant, role: str, threads: int, lanes: int = 1) -> Graph:
    """The graph of a role (`prefix`, `forward`, ...).

    Raises:
        ArtifactError: if the package does not have it or it cannot be loaded.
    """
    if role not in variant.graphs:
        raise ArtifactError(
            f"{bundle.path}: method {variant.method} has no {role} graph; rebuild the package with lance-host"
        )
    members = variant.graphs[role]
    specs = tensor_specs(bundle, variant)
    return Graph(bundle.read(*members), f"{bundle.path}: {members[0]}", threads, specs, lanes)


def tensor_specs(bundle: Bundle, variant: Variant) -> dict[str, TensorSpec]:
    """Everything that passes between graphs and runtime, by name; `"N"` is the micro-batch."""
    manifest = bundle.manifest
    own = (
        TensorSpec(IMAGES, (BATCH_DIM, *manifest.preprocessing.sample_shape), "float32"),
        TensorSpec(LABELS, (BATCH_DIM,), "int64"),
        TensorSpec(LOSS, (), "float32"),
        TensorSpec(LOGITS, (BATCH_DIM, len(manifest.classes)), "float32"),
        *(
            TensorSpec(activation_name(layer.name), (BATCH_DIM, *layer.input_shape), "float32")
            for layer in manifest.layers
        ),
        *(TensorSpec(gradient_name(spec.name), spec.shape, "float32") for spec in manifest.parameters),
    )
    declared = (*variant.boundary, *variant.saved, *_statistics(variant), *variant.activations)
    return {spec.name: spec for spec in (*declared, *own)}


def _statistics(variant: Variant) -> Iterable[TensorSpec]:
    """Those of `hosvd` have other ranks at every step; the manifest holds the estimate from calibration."""
    if variant.method != "hosvd":
        return variant.statistics
    return (
        replace(spec, shape=tuple(f"{spec.name} {axis}" for axis in range(len(spec.shape))))
        for spec in variant.statistics
    )


def starting_parameters(bundle: Bundle, variant: Variant) -> dict[str, Float]:
    """The trainable tensors as calibrated, by state-dict name: fresh, writable arrays."""
    weights = bundle.arrays(WEIGHTS_MEMBER)
    shapes = trained_shapes(bundle, variant)
    return {name: float_array(weights, name, shape, bundle) for name, shape in shapes.items()}


def load_projections(bundle: Bundle, variant: Variant) -> dict[str, Float]:
    """The projections of a variant, `[n_mode, r_mode]` or of groups `[g, D, r]`.

    Batch modes have a row for each sample.

    Raises:
        ArtifactError: if one is missing or has too few columns, or other rows than the batch.
    """
    ranks = variant.projection_ranks
    if not ranks:
        return {}
    stored = bundle.arrays(PROJECTIONS_MEMBER)
    projections = {name: _leading_columns(stored, name, rank, bundle) for name, rank in ranks.items()}
    for name in variant.batch_projections:
        rows = projections[name].shape[:1]
        if rows != (bundle.manifest.batch_size,):
            raise ArtifactError(
                f"{bundle.path}: projection {name} has {rows[0] if rows else 'no'} rows, expected one for each"
                f" of the {bundle.manifest.batch_size} samples of a batch; rebuild the package"
            )
    return projections


def _leading_columns(arrays: ArrayReader, name: str, rank: int, bundle: Bundle) -> Float:
    stored = float_array(arrays, name, None, bundle)
    if stored.ndim not in (2, 3) or stored.shape[-1] < rank:
        raise ArtifactError(
            f"{bundle.path}: projection {name} is {list(stored.shape)}, expected {rank} or more columns, as the"
            " ranks of its layer say; rebuild the package"
        )
    return np.ascontiguousarray(stored[..., :rank])


def float_array(
    arrays: Mapping[str, NDArray[np.generic]], name: str, shape: tuple[int, ...] | None, bundle: Bundle
) -> Float:
    """A writable copy of a float32 array of the package.

    Raises:
        ArtifactError: if it is missing, or of another type or shape.
    """
    found = arrays[name]
    if found.dtype != np.float32 or (shape is not None and found.shape != shape):
        raise ArtifactError(
            f"{bundle.path}: array {name} is {found.dtype} {list(found.shape)}, expected float32"
            f"{'' if shape is None else f' {list(shape)}'}; rebuild the package"
        )
    return np.array(found, dtype=np.float32, order="C")


def run_prefix(prefix: Graph, images: Float) -> dict[str, Array]:
    """Boundary tensors of prepared images `[N, 3, R, R]`, a few images at a time.

    The maps of the first layers are the largest tensors of a whole run: four images of 160 x 160 pixels take
    15 MiB less than eight, and no more time.  The lanes share the four.
    """
    size = max(1, PREFIX_IMAGES // prefix.lanes)
    parts = prefix.run_each({IMAGES: images[start : start + size]} for start in range(0, len(images), size))
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in prefix.outputs}


class Network:
    """Images to logits: the frozen prefix and the inference tail with the trainable weights as inputs."""

    def __init__(self, prefix: Graph, predict: Graph, parameters: dict[str, Float]) -> None:
        """Join.

        Args:
            parameters: read at every call, so a training run sees its present weights.
        """
        self._prefix = prefix
        self._predict = predict
        self._parameters = parameters

    def __call__(self, images: Float) -> Float:
        """Logits `[N, classes]` of prepared images `[N, 3, R, R]`."""
        return self.by_head(self.boundary(images), {})

    def boundary(self, images: Float) -> dict[str, Array]:
        """What the prefix makes of images: all heads read the same."""
        return run_prefix(self._prefix, images)

    def by_head(self, boundary: Mapping[str, Array], head: Mapping[str, Float]) -> Float:
        """Logits `[N, classes]` of boundary tensors, with these parameters in place of the current head's."""
        return self._predict.run({**self._parameters, **boundary, **head})[LOGITS]


def load_network(bundle: Bundle, variant: Variant, parameters: dict[str, Float], threads: int) -> Network:
    """The network of a package with these weights."""
    prefix, predict = (load_graph(bundle, variant, role, threads) for role in ("prefix", "predict"))
    if bundle.manifest.tasks:  # their heads have as many classes as they have
        predict.expect(TensorSpec(LOGITS, (BATCH_DIM, CLASSES_DIM), "float32"))
    return Network(prefix, predict, parameters)


def missing_names(wanted: Iterable[str], *provided: Iterable[str]) -> list[str]:
    """Names that none of the providers has."""
    have = {name for names in provided for name in names}
    return [name for name in wanted if name not in have]
