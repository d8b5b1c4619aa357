"""Helpers of the host tests: tiny graphs, running graphs, and a device made of a loop and NumPy."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lance_edge.names import DROPOUT_SEEDS
from lance_edge.targets import Targets
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.reverse import InputGradient, gradients
from lance_host.methods import projection_inputs
from lance_host.stages import Stages, cut_stages
from lance_host.step import Step

Array = NDArray[np.generic]
Shape = Sequence[int | str]
OPSET = 18


# --- running graphs -----------------------------------------------------------------------------------


def open_session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, values: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds exactly the inputs that the graph declares, by name."""
    feeds = {node.name: values[node.name] for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_graph(model: ir.Model, values: Mapping[str, Array]) -> dict[str, Array]:
    return run_session(open_session(model), values)


# --- tiny graphs --------------------------------------------------------------------------------------


def graph_of_nodes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    constants: Mapping[str, Array],
    opset: int = OPSET,
) -> ir.Model:
    """A float32 graph with the output `y`, with shapes inferred as those of an exported network are."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))


def append_gradients(
    model: ir.Model, wrt: Sequence[str], overrides: Mapping[tuple[ir.Node, int], InputGradient] | None = None
) -> list[ir.Value]:
    """Replace the outputs by `grad_<name>`; the gradient of `y` becomes the input `dy`."""
    graph = model.graph
    seed = ir.Value(name="dy", type=ir.TensorType(ir.DataType.FLOAT), shape=graph.outputs[0].shape)
    graph.inputs.append(seed)
    emit = Emit(graph, "grad/")
    by_name = {value.name: value for value in graph.inputs}
    values = gradients(emit, graph.outputs[0], seed, [by_name[name] for name in wrt], overrides or {})
    results = [emit("Identity", value) for value in values]  # two gradients may be the same value
    for name, value in zip(wrt, results, strict=True):
        value.name = f"grad_{name}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = results
    return results


def declare_float(value: ir.Value) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    return value


# --- comparing ----------------------------------------------------------------------------------------


def relative_error(found: Array, truth: Array | torch.Tensor) -> float:
    """Largest difference over the largest true value; the shapes must agree."""
    expected = truth.detach().numpy() if isinstance(truth, torch.Tensor) else np.asarray(truth)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def random_basis(rng: np.random.Generator, size: int, rank: int) -> Array:
    """`[size, rank]` float32 with orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((size, rank)))[0].astype(np.float32)


def random_projections(
    rng: np.random.Generator, layer: str, batch: int, input_shape: Sequence[int], ranks: Sequence[int]
) -> dict[str, Array]:
    """U0 `[B, r0]`, U1 `[n1, r1]`, ... by the names of the graph's inputs; no U0 where r0 is B."""
    inputs = projection_inputs(layer, input_shape, ranks, batch)
    sizes = (batch, *input_shape)
    return {str(value.name): random_basis(rng, sizes[mode], ranks[mode]) for mode, value in inputs.items()}


# --- the literal method ---------------------------------------------------------------------------------


def project_and_rebuild(
    x: torch.Tensor, projections: Mapping[str, Array], layer: str = "layer"
) -> torch.Tensor:
    """A x_0 U0 U0^T x_1 U1 U1^T ... over all modes, through the core, in the shape of A.

    A mode without a projection is left as it is.
    """
    sizes = x.shape
    bases = [
        torch.from_numpy(projections[f"{layer}/U{mode}"]).to(x.dtype)
        if f"{layer}/U{mode}" in projections
        else torch.eye(sizes[mode], dtype=x.dtype)
        for mode in range(x.ndim)
    ]
    tensor, core = "bchw"[: x.ndim], "ijkl"[: x.ndim]
    factors = ",".join(map("".join, zip(tensor, core, strict=True)))
    small = torch.einsum(f"{tensor},{factors}->{core}", x, *bases)
    return torch.einsum(f"{core},{factors}->{tensor}", small, *bases)


# --- the device -----------------------------------------------------------------------------------------


@dataclass
class Device:
    """Runs a step's stage graphs in micro-batches, as `docs/artifact.md` tells a device to."""

    step: Step
    stages: Stages
    sessions: dict[str, onnxruntime.InferenceSession] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step) -> "Device":
        stages = cut_stages(step)
        return cls(step, stages, {role: open_session(model) for role, model in stages.graphs.items()})

    def gradients(
        self,
        tensors: Mapping[str, Array],
        images: Array,
        labels: Array,
        parts: Sequence[int] | None = None,
        targets: Targets | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Mean loss of the batch, and the gradient of each parameter by name.

        `tensors` are parameters and projections; `parts` the sizes of the micro-batches; `targets` by default
        those of ordinary cross-entropy.
        """
        batch = len(images)
        targets = targets or Targets.plain(int(self.step.targets[0].shape[0]))
        total = targets.total_weight(labels)
        tensors = {**tensors, **targets.arrays(), "scale": np.array(1 / total, np.float32)}
        parts = parts or [batch]
        assert sum(parts) == batch
        edges = np.cumsum([0, *parts])
        rows = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        if self.stages.schedule == "by layer":
            loss, gradients = self._layerwise(tensors, images, labels)
            return loss / total, gradients
        fixed = dict(tensors)
        if "prepare" in self.sessions:
            fixed |= run_session(self.sessions["prepare"], fixed)
        loss, totals, waiting = 0.0, dict[str, Array](), list[dict[str, Array]]()
        for part in rows:
            feeds = self._own_rows(fixed, part) | {"images": images[part], "labels": labels[part]}
            forward, reads = self._forward(feeds)
            loss += float(forward["loss"])
            self._add(totals, forward)
            waiting.append(reads)
            if self.stages.schedule == "one pass":
                self._add(totals, run_session(self.sessions["backward"], waiting.pop()))
        for reads in waiting:
            self._add(totals, run_session(self.sessions["backward"], reads | totals))
        values = {**tensors, **totals}
        if "gradient" in self.sessions:
            values |= run_session(self.sessions["gradient"], values)
        names = [value.name for value in self.step.parameters if value.name is not None]
        return loss / total, {name: values[f"{name}/grad"] for name in names}

    def _layerwise(
        self, tensors: Mapping[str, Array], images: Array, labels: Array
    ) -> tuple[float, dict[str, Array]]:
        """The whole batch; cores are literal projections on the factors in `tensors`, of this batch."""
        values = dict(tensors) | {"images": images, "labels": labels}
        parts = sorted(
            (role for role in self.sessions if role.startswith("forward-")), key=lambda r: int(r[8:])
        )
        for role in ("prefix", "prepare", *parts):
            values |= run_session(self.sessions[role], values) if role in self.sessions else {}
        layers = [
            str(value.name).removesuffix("/G") for value in self.step.compressed if "/G" in str(value.name)
        ]
        for layer, spec in zip(layers, self.stages.activations, strict=True):
            core = values[spec.name]
            for mode in range(core.ndim):
                core = np.moveaxis(
                    np.tensordot(core, tensors[f"{layer}/U{mode}"], axes=([mode], [0])), -1, mode
                )
            values[f"{layer}/G"] = core.swapaxes(0, 1).astype(np.float32)
        values |= run_session(self.sessions["backward"], values)
        if "gradient" in self.sessions:
            values |= run_session(self.sessions["gradient"], values)
        names = [value.name for value in self.step.parameters if value.name is not None]
        return float(values["loss"]), {name: values[f"{name}/grad"] for name in names}

    def _own_rows(self, values: Mapping[str, Array], rows: slice) -> dict[str, Array]:
        return {
            name: array[rows] if name.endswith(("/U0", DROPOUT_SEEDS)) else array
            for name, array in values.items()
        }

    def _add(self, totals: dict[str, Array], values: Mapping[str, Array]) -> None:
        for spec in self.stages.statistics:
            if spec.name in values:
                totals[spec.name] = totals.get(spec.name, 0) + values[spec.name]

    def _forward(self, feeds: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """What forward gives, and what backward may read: the plan's saved tensors and what it is fed."""
        boundary = run_session(self.sessions["prefix"], feeds)
        forward = run_session(self.sessions["forward"], feeds | boundary)
        saved = {spec.name for spec in self.stages.saved}
        reads = {name: array for name, array in (feeds | boundary | forward).items() if name in saved}
        fed = {name: array for name, array in feeds.items() if name != "images"}
        return forward, fed | reads


@dataclass
class MomentumSgd:
    """v = m v + g; w = w - lr v, as `torch.optim.SGD` without dampening."""

    learning_rate: float
    momentum: float
    velocity: dict[str, Array] = field(default_factory=dict)

    def update(self, tensors: dict[str, Array], gradient: Mapping[str, Array]) -> None:
        for name, g in gradient.items():
            self.velocity[name] = self.momentum * self.velocity.get(name, np.zeros_like(g)) + g
            tensors[name] = (tensors[name] - self.learning_rate * self.velocity[name]).astype(np.float32)
