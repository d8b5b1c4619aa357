"""The package: what is in it, and that the same command makes the same one."""

import dataclasses
import hashlib
import io
import re
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest

from lance_edge.bundle import Bundle
from lance_edge.errors import DataError, LanceError, ModelError, StorageError
from lance_host.build import VERIFY_IMAGES, VERIFY_SETS, calibrate
from lance_host.capture import Captured, capture_layers, export
from lance_host.methods import METHODS
from lance_host.network import NetworkRequest
from lance_host.request import Feedback, Request
from lance_host.selection import method_names
from lance_host.tables import layer_table, package_table

ROLES = ("prefix", "prepare", "forward", "backward", "gradient", "predict", "tail")
MICRO_BATCHES = (3, 8)
TRAINED_CONVS = (  # the last four convolutions in module order, from the published architecture
    "blocks.12.mobile_inverted_conv.point_linear.conv",
    "blocks.13.mobile_inverted_conv.inverted_bottleneck.conv",
    "blocks.13.mobile_inverted_conv.depth_conv.conv",
    "blocks.13.mobile_inverted_conv.point_linear.conv",
)


def silent():
    return Feedback(say=lambda line: None, progress=lambda name, done, total: None)


def request(photos, output, weights, **options):
    words = {"model": "mcunet-10fps-vww", "resolution": 96, "threads": 1, **options}
    return Request(data=photos, output=output, weights=str(weights), **words)


def test_what_a_request_leaves_open_is_what_a_network_request_leaves_open(tmp_path):
    assert Request("resnet18", tmp_path, tmp_path / "pkg.tar").network == NetworkRequest("resnet18")


@pytest.fixture(scope="module", autouse=True)
def exported_once():
    """One network, exported once with the same weights: that is most of the time of a calibration here."""
    exports = {}

    def shared(network, sample, has_dropout):
        weights = hashlib.sha256(b"".join(x.numpy().tobytes() for x in network.state_dict().values()))
        key = (weights.hexdigest(), tuple(sample), has_dropout)
        if key not in exports:
            exports[key] = export(network, sample, has_dropout)
        return exports[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lance_host.build.export", shared)
        yield


@pytest.fixture(scope="module")
def bundle(photo_package):
    with Bundle(photo_package) as opened:
        yield opened


@dataclass(frozen=True)
class HeadOnly:
    """A package of `--layers 0`, what was said while it was made, and the captured network."""

    bundle: Bundle
    said: list[str]
    captured: Captured


@pytest.fixture(scope="module")
def head_only(photos, start_weights, tmp_path_factory):
    path, said, captured = tmp_path_factory.mktemp("head") / "head.tar", [], []

    def keep(*arguments):
        captured.append(capture_layers(*arguments))
        return captured[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lance_host.build.capture_layers", keep)
        feedback = Feedback(say=said.append, progress=lambda name, done, total: None)
        calibrate(request(photos, path, start_weights, layers="0"), feedback)
    with Bundle(path) as bundle:
        yield HeadOnly(bundle, said, captured[0])


# --- determinism ---


def test_the_same_command_gives_the_same_bytes_in_every_process(twin_packages):
    first, second = (path.read_bytes() for path in twin_packages)
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()


def test_another_seed_gives_another_package(bundle, photos, start_weights, tmp_path):
    calibrate(request(photos, tmp_path / "pkg.tar", start_weights, seed=1), silent())
    with Bundle(tmp_path / "pkg.tar") as other:
        assert other.sha256 != bundle.sha256
        assert other.manifest.seed == 1
        assert other.manifest.split == bundle.manifest.split, "the seed moves no image to another part"
        heads = [opened.arrays("weights.npz")["classifier.linear.weight"] for opened in (bundle, other)]
        assert np.any(heads[0] != heads[1])
        name = f"{TRAINED_CONVS[0]}/eigenvalues0"
        spectra = [opened.arrays("spectra.npz")[name] for opened in (bundle, other)]
        assert np.any(spectra[0] != spectra[1]), "the calibration batches hold other images"


# --- members ---


def test_the_manifest_says_what_was_asked_for(bundle):
    manifest = bundle.manifest
    assert manifest.model == "mcunet-10fps-vww"
    assert manifest.classes == ("disc", "square", "stripes")
    assert list(manifest.methods) == ["lance", "bp"], "the first one is the device's default"
    assert (manifest.energy, manifest.mode, manifest.seed) == (0.7, "channel", 0)
    # 3 classes of 20 photos: 5 to test, 2 to validate, 13 to train; 39 hold two batches of 16.
    assert (manifest.batch_size, manifest.calibration_batches) == (16, 2)
    assert (manifest.preprocessing.resolution, manifest.preprocessing.resize) == (96, 96 * 256 // 224)
    assert manifest.weights_source.startswith("file: start.pth, sha256 ")


def test_parameters_stand_in_module_order_with_the_head_at_the_end(bundle):
    expected = [f"{name}.weight" for name in TRAINED_CONVS]
    expected += ["classifier.linear.weight", "classifier.linear.bias"]
    assert [spec.name for spec in bundle.manifest.parameters] == expected
    weights = bundle.arrays("weights.npz")
    assert [spec.shape for spec in bundle.manifest.parameters] == [weights[name].shape for name in expected]
    for variant in bundle.manifest.variants:
        assert list(variant.parameters) == expected
        assert [plan.layer for plan in variant.layers] == list(TRAINED_CONVS)


def test_graphs_that_methods_share_are_stored_once(bundle):
    graphs = [member for member in bundle.manifest.members if member.name.endswith(".onnx")]
    assert len({member.sha256 for member in graphs}) == len(graphs)
    lance, bp = (bundle.manifest.variant(name).graphs for name in ("lance", "bp"))
    for role in ("prefix", "predict", "tail"):
        assert lance[role] == bp[role]
    assert lance["backward"] != bp["backward"]
    used = {name for v in bundle.manifest.variants for names in v.graphs.values() for name in names}
    assert used == {member.name for member in graphs}, "nothing is shipped that nobody runs"


def whole_graphs(bundle):
    """Every distinct graph of a package, joined from its members."""
    names = {members for variant in bundle.manifest.variants for members in variant.graphs.values()}
    return {members[0]: bundle.read(*members) for members in sorted(names)}


def test_graphs_use_the_default_domain_only_and_are_valid(bundle):
    for name, data in whole_graphs(bundle).items():
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain for entry in model.opset_import} == {""}, name
        assert {node.domain for node in model.graph.node} == {""}, name
        assert not model.functions, name
        constants = [tensor.name for tensor in model.graph.initializer]
        assert len(constants) == len(set(constants)), name


def test_trainable_weights_are_inputs_and_never_constants(bundle):
    names = {spec.name for spec in bundle.manifest.parameters}
    for variant in bundle.manifest.variants:
        for role in ("prepare", "forward", "backward", "predict", "tail"):
            graph = onnx.load_from_string(bundle.read(*variant.graphs[role])).graph
            if role in ("predict", "tail"):
                assert names <= {value.name for value in graph.input}
            assert not names & {tensor.name for tensor in graph.initializer}


def test_weights_are_those_of_the_file_with_a_new_head(bundle, start_weights):
    import torch

    given = torch.load(start_weights, weights_only=True)
    stored = bundle.arrays("weights.npz")
    assert set(stored) == set(given)
    for name, value in given.items():
        if not name.startswith("classifier."):
            np.testing.assert_array_equal(stored[name], value.numpy(), err_msg=name)


# --- projections and spectra ---


def test_spectra_hold_every_eigenvalue_of_every_mode(bundle):
    spectra = bundle.arrays("spectra.npz")
    sizes = {
        f"{layer.name}/eigenvalues{mode}": size
        for layer in bundle.manifest.layers
        for mode, size in enumerate((bundle.manifest.batch_size, *layer.input_shape))
    }
    assert set(spectra) == set(sizes)
    for name, size in sizes.items():
        values = spectra[name]
        assert values.dtype == np.float64
        assert values.shape == (size,)
        assert np.all(np.diff(values) <= 0)
        assert np.all(values >= 0)
    for layer in bundle.manifest.layers:
        totals = [spectra[f"{layer.name}/eigenvalues{mode}"].sum() for mode in range(4)]
        np.testing.assert_allclose(totals, totals[0], rtol=1e-9)  # each is the energy of the activation


def test_ranks_are_the_smallest_that_keep_the_energy(bundle):
    spectra, energy = bundle.arrays("spectra.npz"), bundle.manifest.energy
    for plan in bundle.manifest.variant("lance").layers:
        for mode, (rank, kept) in enumerate(zip(plan.ranks, plan.energy_kept, strict=True)):
            values = spectra[f"{plan.layer}/eigenvalues{mode}"]
            share = values[:rank].sum() / values.sum()
            assert share >= energy - 1e-12
            assert values[: rank - 1].sum() / values.sum() < energy
            assert kept == pytest.approx(share)


def test_projections_have_the_planned_shape_and_orthonormal_columns(bundle):
    projections = bundle.arrays("projections.npz")
    layers = {layer.name: layer for layer in bundle.manifest.layers}
    seen = set()
    for plan in bundle.manifest.variant("lance").layers:
        sizes = (bundle.manifest.batch_size, *layers[plan.layer].input_shape)
        for mode, (size, rank) in enumerate(zip(sizes, plan.ranks, strict=True)):
            basis = projections[f"{plan.layer}/U{mode}"]
            seen.add(f"{plan.layer}/U{mode}")
            assert basis.dtype == np.float32
            assert basis.shape == (size, rank)
            gram = basis.astype(np.float64).T @ basis
            np.testing.assert_allclose(gram, np.eye(rank), atol=1e-5)
    assert set(projections) == seen


# --- what the manifest says of tensors is what the graphs give ---


def arrays_of(bundle, variant, micro_batch):
    """Everything that a micro-batch is fed, and what the graphs give, by name."""
    rng = np.random.default_rng(0)
    resolution = bundle.manifest.preprocessing.resolution
    projections = bundle.arrays("projections.npz")
    weights = bundle.arrays("weights.npz")
    values = {name: weights[name] for name in variant.parameters}
    values |= {name: projections[name] for name in variant.projections}
    values |= {name: projections[name][:micro_batch] for name in variant.batch_projections}
    values["images"] = rng.uniform(-1, 1, (micro_batch, 3, resolution, resolution)).astype(np.float32)
    values["labels"] = rng.integers(0, 3, micro_batch)
    values["scale"] = np.array(1 / 16, np.float32)
    values |= {"target/on": np.ones(3, np.float32), "target/off": np.zeros(3, np.float32)}
    for role in ROLES:
        if role in variant.graphs:
            session = onnxruntime.InferenceSession(
                bundle.read(*variant.graphs[role]), providers=["CPUExecutionProvider"]
            )
            names = [output.name for output in session.get_outputs()]
            feeds = {given.name: values[given.name] for given in session.get_inputs()}
            values |= dict(zip(names, session.run(names, feeds), strict=True))
    return values


@pytest.mark.parametrize("method", ["lance", "bp"])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_tensors_are_as_the_manifest_declares(bundle, method, micro_batch):
    variant = bundle.manifest.variant(method)
    values = arrays_of(bundle, variant, micro_batch)
    for spec in (*variant.boundary, *variant.saved, *variant.statistics):
        shape = spec.sizes(micro_batch)
        assert values[spec.name].shape == shape, spec.name
        assert str(values[spec.name].dtype) == spec.dtype, spec.name
        kept = np.packbits(values[spec.name]) if spec.dtype == "bool" else values[spec.name]
        assert kept.nbytes == spec.nbytes(micro_batch), spec.name
    for spec in bundle.manifest.parameters:
        assert values[f"{spec.name}/grad"].shape == spec.shape


@pytest.mark.parametrize("method", ["lance", "bp"])
def test_saved_is_what_backward_reads_of_forward_and_prefix(bundle, method):
    variant = bundle.manifest.variant(method)

    def graph(role):
        return onnx.load_from_string(bundle.read(*variant.graphs[role])).graph

    produced = {value.name for role in ("prefix", "forward") for value in graph(role).output}
    reads = {value.name for value in graph("backward").input}
    statistics = {spec.name for spec in variant.statistics}  # which backward reads complete, in two passes
    assert {spec.name for spec in variant.saved} == reads & produced - statistics
    late = {value.name for role in ("forward", "backward") for value in graph(role).output}
    assert {spec.name for spec in variant.statistics} <= late
    assert not any("N" in spec.shape for spec in variant.statistics), "a statistic is a sum over the batch"


def test_activation_bytes_are_those_of_the_formulas(bundle):
    """BP keeps the input A, float32; LANCE core and factors (arXiv 2509.21617)."""
    batch = bundle.manifest.batch_size
    for layer, bp, lance in zip(
        bundle.manifest.layers,
        bundle.manifest.variant("bp").layers,
        bundle.manifest.variant("lance").layers,
        strict=True,
    ):
        sizes = (batch, *layer.input_shape)
        assert bp.activation_bytes == 4 * np.prod(sizes)
        assert bp.ranks == ()
        factors = sum(size * rank for size, rank in zip(sizes, lance.ranks, strict=True))
        assert lance.activation_bytes == 4 * (np.prod(lance.ranks) + factors)


# --- head only ---


def test_head_only_is_plain_backpropagation_whatever_the_methods(head_only):
    bundle, manifest = head_only.bundle, head_only.bundle.manifest
    assert list(manifest.methods) == ["bp"]
    assert "with no layer but the head trained, all methods are plain backpropagation" in head_only.said
    assert [spec.name for spec in manifest.parameters] == [
        "classifier.linear.weight",
        "classifier.linear.bias",
    ]
    assert manifest.layers == ()
    assert manifest.variant("bp").activation_bytes == 0
    assert manifest.calibration_batches == 0
    assert not list(bundle.arrays("projections.npz"))
    assert not list(bundle.arrays("spectra.npz"))


def test_head_only_gradients_are_those_of_softmax_regression(head_only):
    """dW = (softmax - onehot)^T features / B, from the features that the prefix itself gives."""
    bundle = head_only.bundle
    values = arrays_of(bundle, bundle.manifest.variant("bp"), 5)
    weight, bias = values["classifier.linear.weight"], values["classifier.linear.bias"]
    (boundary,) = bundle.manifest.variant("bp").boundary
    features = values[boundary.name].reshape(5, weight.shape[1], -1).mean(axis=2, dtype=np.float64)
    logits = features @ weight.T + bias
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (softmax - np.eye(3)[values["labels"]]) / 16  # [N, classes]; scale is 1/16
    np.testing.assert_allclose(
        values["classifier.linear.weight/grad"], error.T @ features, rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(values["classifier.linear.bias/grad"], error.sum(axis=0), rtol=1e-4, atol=1e-7)
    assert values["loss"] == pytest.approx(-np.log(softmax[np.arange(5), values["labels"]]).sum(), rel=1e-5)


# --- several counts of layers ---


@pytest.fixture(scope="module")
def choice(photos, start_weights, tmp_path_factory):
    """A package of `--layers 0,2,4 --methods all`, otherwise made as `photo_package` was."""
    path = tmp_path_factory.mktemp("choice") / "bench.tar"
    options = {"layers": "0,2,4", "methods": method_names("all")}
    calibrate(request(photos, path, start_weights, **options), silent())
    with Bundle(path) as bundle:
        yield bundle


def test_there_is_a_variant_for_every_method_and_count(choice):
    manifest = choice.manifest
    assert manifest.methods == method_names("all")
    assert manifest.layer_counts == (0, 2, 4)
    found = {(variant.method, len(variant.layers)) for variant in manifest.variants}
    assert found == {("bp", 0)} | {(method, count) for method in METHODS for count in (2, 4)}
    for variant in manifest.variants:
        names = TRAINED_CONVS[len(TRAINED_CONVS) - len(variant.layers) :]
        assert tuple(plan.layer for plan in variant.layers) == names
        assert len(variant.parameters) == len(names) + 2
    assert manifest.variant().method == "lance"
    assert len(manifest.variant().layers) == 4, "the most that there are"


def content(data):
    """A graph whose constants are named by their content, and these, whatever their order was."""
    model = onnx.load_from_string(data)
    names = {}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        names[tensor.name] = f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    del model.graph.initializer[:]
    return model.SerializeToString(deterministic=True), set(names.values())


@pytest.mark.parametrize("method", ["lance", "bp"])
def test_its_graphs_are_those_of_a_package_with_this_count_alone(choice, bundle, method):
    own, alone = choice.manifest.variant(method, 4), bundle.manifest.variant(method)
    assert own.graphs.keys() == alone.graphs.keys()
    for role in own.graphs:
        assert content(choice.read(*own.graphs[role])) == content(bundle.read(*alone.graphs[role])), role
    graphs = {"graphs": alone.graphs}
    assert dataclasses.replace(own, **graphs) == alone
    for name in own.projection_ranks:
        stored, expected = choice.arrays("projections.npz")[name], bundle.arrays("projections.npz")[name]
        np.testing.assert_array_equal(stored, expected, err_msg=name)


def test_weights_that_the_counts_have_in_common_are_stored_once(choice):
    large = [
        onnx.numpy_helper.to_array(tensor).tobytes()
        for member in choice.manifest.members
        if member.name.endswith(".onnx")
        for tensor in onnx.load_from_string(choice.read(member.name)).graph.initializer
        if tensor.ByteSize() > 4096
    ]
    assert len(large) > 20
    assert len(large) == len(set(large))
    used = {n for v in choice.manifest.variants for names in v.graphs.values() for n in names}
    assert used == {member.name for member in choice.manifest.members if member.name.endswith(".onnx")}


def test_its_tables_have_a_row_for_each_count(choice):
    table = package_table(choice.manifest)
    assert "0, 2 or 4 layers and classifier.linear.weight, classifier.linear.bias: 6 tensors" in table
    rows = [line.split() for line in table.splitlines() if re.match(r"[024]  ", line)]
    assert len(rows) == 3 * 3, "three costs for three counts"
    narrow = package_table(choice.manifest.with_layers(2))
    assert "2 layers and classifier.linear.weight, classifier.linear.bias: 4 tensors" in narrow
    assert "multiply-adds, backward graph" in narrow
    assert len(choice.manifest.with_layers(2).layers) == 2
    assert TRAINED_CONVS[0] not in layer_table(choice.manifest.with_layers(2))


# --- small batches ---


def test_a_batch_may_be_smaller_than_what_is_verified_at_most(photos, start_weights, tmp_path):
    manifest = calibrate(request(photos, tmp_path / "pkg.tar", start_weights, batch_size=2), silent())
    assert manifest.batch_size == 2 < VERIFY_IMAGES


# --- what cannot be done ---


REFUSALS = {
    "no method": (
        {"methods": ()},
        LanceError,
        "--methods: expected all, or some of bp, lance, asi, hosvd, found none",
    ),
    "unknown method": (
        {"methods": ("bp", "sgd")},
        LanceError,
        "expected all, or some of bp, lance, asi, hosvd, found sgd",
    ),
    "no energy": ({"energy": 0.0}, LanceError, "--energy: expected a share above 0 and at most 1, found 0.0"),
    "not a number": ({"energy": float("nan")}, LanceError, "--energy: .* found nan"),
    "unknown model": ({"model": "resnet"}, ModelError, "no such network; lance-host knows mcunet"),
    "too many layers": ({"layers": "99"}, ModelError, "--layers 99: the network has only 42"),
    "large batch": ({"batch_size": 64}, DataError, "at most the 39 training images, found 64"),
    "no batches": ({"batches": 0}, LanceError, "--batches: expected 1 or more, found 0"),
    "negative seed": ({"seed": -1}, LanceError, "--seed: expected 0 or more, found -1"),
    "huge seed": ({"seed": 2**64}, LanceError, "--seed: expected at most 9223372036854775807, found 1844"),
    "no threads": ({"threads": -1}, LanceError, "--threads: expected 1 or more, found -1"),
    "no pixels": ({"resolution": 0}, LanceError, "--input-size: expected 32 or more, found 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_the_work_and_leave_nothing(case, photos, start_weights, tmp_path, monkeypatch):
    options, kind, pattern = REFUSALS[case]
    monkeypatch.setattr("lance_host.build.export", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(kind, match=pattern):
        calibrate(request(photos, tmp_path / "pkg.tar", start_weights, **options), silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file/pkg.tar", "file/deeper/pkg.tar"])
def test_an_output_below_a_file_is_refused_before_the_work(name, photos, start_weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("lance_host.build.export", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(StorageError, match=r"pkg\.tar: cannot write \(.*/file: this file is no folder\)"):
        calibrate(request(photos, tmp_path / name, start_weights), silent())


def test_graphs_that_do_not_train_as_pytorch_does_are_not_shipped(
    photos, start_weights, tmp_path, monkeypatch, head_only
):
    """`calibrate` really asks `verify`, with the user's images."""
    asked = []

    def refuse(network, layers, compiled, weights, projections, images, labels, norms):
        asked.append((compiled.variant.method, images.shape, labels.tolist()))
        raise ModelError("method bp: differs")

    monkeypatch.setattr("lance_host.verify.verify", refuse)
    monkeypatch.setattr("lance_host.build.capture_selections", lambda *_: (head_only.captured,))
    with pytest.raises(ModelError, match="method bp: differs"):
        calibrate(request(photos, tmp_path / "pkg.tar", start_weights, layers="0"), silent())
    assert len(asked) == VERIFY_SETS
    for method, shape, labels in asked:
        assert (method, shape) == ("bp", (8, 3, 96, 96))
        assert set(labels) == {0, 1, 2}, "images of every class"
    assert not list(tmp_path.iterdir())


def test_graphs_that_agree_on_one_set_of_images_are_shipped(
    photos, start_weights, tmp_path, monkeypatch, head_only
):
    """A unit on the kink of a ReLU makes a difference on the first set."""
    asked, said = [], []

    def refuse_once(network, layers, compiled, weights, projections, images, labels, norms):
        asked.append(images)
        if len(asked) == 1:
            raise ModelError("method bp: differs")
        return 1e-6

    monkeypatch.setattr("lance_host.verify.verify", refuse_once)
    monkeypatch.setattr("lance_host.build.capture_selections", lambda *_: (head_only.captured,))
    feedback = Feedback(say=said.append, progress=lambda name, done, total: None)
    calibrate(request(photos, tmp_path / "pkg.tar", start_weights, layers="0"), feedback)
    assert len(asked) == 2
    assert np.abs(asked[0] - asked[1]).max() > 0, "other images"
    assert "verified: loss and gradients of bp agree with PyTorch to 1e-06" in said


def test_arrays_are_stored_without_pickle(bundle):
    for name in ("weights.npz", "projections.npz", "spectra.npz"):
        with np.load(io.BytesIO(bundle.read(name)), allow_pickle=False) as archive:
            assert all(archive[key].dtype.kind in "fiu" for key in archive.files)


# --- memory budget ---


def test_a_budget_chooses_the_ranks_and_is_kept(photos, start_weights, tmp_path):
    """Both counts of layers within the budget, trainable (verified), and not worse than one energy."""
    said = []
    budgets = {"lance": 40 << 10, "asi": 60 << 10}
    options = {"layers": "2,4", "methods": ("lance", "asi", "bp"), "budgets": budgets}
    feedback = Feedback(say=said.append, progress=lambda name, done, total: None)
    manifest = calibrate(request(photos, tmp_path / "pkg.tar", start_weights, **options), feedback)
    assert [(variant.method, len(variant.layers)) for variant in manifest.variants] == [
        (method, count) for method in ("lance", "asi", "bp") for count in (2, 4)
    ]
    for variant in manifest.variants:
        assert variant.energy is None
        assert variant.budget_bytes == budgets.get(variant.method)
        if variant.budget_bytes is not None:
            assert 0.7 * variant.budget_bytes < variant.activation_bytes <= variant.budget_bytes
    for method in budgets:
        lines = next(text for text in said if text.startswith(f"{method.upper()}, memory budget")).splitlines()
        total = next(line.split() for line in lines if line.startswith("total"))
        fewer = next(line.split() for line in lines if line.startswith("2 layers"))
        assert float(total[3]) <= float(total[6])
        assert float(fewer[3]) <= float(fewer[8])
        assert any(text.startswith(f"verified: loss and gradients of {method} agree") for text in said)


def test_a_budget_that_cannot_be_met_is_refused_before_calibration(photos, start_weights, tmp_path):
    said = []
    feedback = Feedback(say=said.append, progress=lambda name, done, total: None)
    wanted = request(photos, tmp_path / "pkg.tar", start_weights, methods=("lance",), budgets={"lance": 2000})
    with pytest.raises(LanceError, match=r"expected at least \d+B \(rank 1 in every mode of the 4 layers"):
        calibrate(wanted, feedback)
    assert not any(text.startswith("calibration:") for text in said)
