"""The peer comparison: its contenders compute the same, and its report says what was measured."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.batches import LEARNING_RATE, same_batch
from benchmarks.compare import compare
from benchmarks.contenders import CONTENDERS
from benchmarks.job import Job, Tuning
from benchmarks.material import BATCHES, SPLIT, Material, inference_model, photos_per_class, write_photos
from benchmarks.ort_report import StepRow
from benchmarks.ort_report import report as ort_report
from benchmarks.ort_training import main as ort_main
from benchmarks.plan import Options, plan_round
from benchmarks.process import BenchmarkError, Watched, measure, reason, watch
from benchmarks.report import LOSS_TOLERANCE, report, warnings_of
from benchmarks.rows import PeerRow, summarise
from benchmarks.targets import TARGETS, Figures, Target
from benchmarks.torch_lance import LanceConv, use_lance
from benchmarks.torch_network import ScaledConv, fuse_batch_norm, load_network, split
from benchmarks.torch_plain import lance_projections
from benchmarks.torch_tuned import ENGINES, TunedStep
from benchmarks.tuning import candidates, search
from benchmarks.weight_gradient import input_name, output_gradient_name, weight_graphs
from benchmarks.weight_work import WeightWork, invented_parts
from benchmarks.worker import work
from lance_device.bench_report import about_load
from lance_device.features import Batch, Unmetered
from lance_device.graphs import load_projections
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError, LanceError, ModelError
from lance_edge.manifest import Manifest
from lance_edge.names import WEIGHTS_MEMBER, gradient_name
from lance_edge.profiles import read_rows
from lance_host.zoo import ZOO

LAYERS = 4


@pytest.fixture(scope="module")
def material(photo_package: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    model = tmp_path_factory.mktemp("inference") / "inference.onnx"
    model.write_bytes(inference_model(photo_package))
    return Material(photo_package, photos, model)


@pytest.fixture
def job(material: Material) -> Callable[..., Job]:
    def make(contender: str, **values: Any) -> Job:
        paths = {name: str(getattr(material, name)) for name in ("package", "model")}
        fixed = {"layers": LAYERS, "micro_batch": 5, "threads": 1, "steps": 1}
        return Job(contender, data=str(material.photos), **{**paths, **fixed, **values})

    return make


def read(path: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    with Bundle(path) as bundle:
        arrays = bundle.arrays(WEIGHTS_MEMBER)
        return bundle.manifest, {name: arrays[name] for name in arrays}


# --- they compute the same -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "values"),
    [
        ("lance", {}),
        ("bp", {"cached": True}),
        ("torch-bp", {}),
        ("torch-lance", {}),
        ("torch-tuned", {"tuning": Tuning("eager", True, 5)}),
        ("torch-tuned", {"tuning": Tuning("jit", False, 16), "cached": True}),
        ("onnxruntime", {"layers": 0}),
    ],
)
def test_everybody_has_the_losses_of_plain_pytorch(
    contender: str, values: dict[str, Any], job: Callable[..., Job], material: Material, tmp_path: Path
) -> None:
    work(job(contender, **values), tmp_path / "rows.csv")
    rows = list(read_rows(tmp_path / "rows.csv", PeerRow))
    manifest, weights = read(material.package)
    batch = same_batch(job("bp"), manifest)
    method = CONTENDERS[contender].method
    trained = manifest.variant(method).parameters if method else ()
    network = load_network(manifest, weights, trained)
    if method == "lance":
        use_lance(network, lance_projections(job("torch-lance")))
    expected = literal_losses(network, batch)
    first = [row for row in rows if row.step == 1]
    (loss,) = {row.loss for row in first}
    (second,) = {row.loss for row in rows if row.step == 2}
    # float32 through 40 layers agrees to 1e-5; kept features of ours are float16, good to 1e-3.
    tolerance = 1e-3 if values.get("cached") else 1e-5
    assert loss == pytest.approx(expected[0], rel=tolerance)
    # Units at the kink of a ReLU6 fall to either side, and that changes the gradient: by less than 2 % of its
    # effect, where a layer without gradient or a clip that is missing changes it by much more.
    moved = expected[0] - expected[1]
    assert second == pytest.approx(expected[1], abs=0.02 * abs(moved) + tolerance * expected[1])
    assert bool(trained) == (moved > LOSS_TOLERANCE * 5)  # so far that the report can tell a wrong gradient
    phases = {row.phase: row.latency_ms for row in rows if row.step == 2}
    work_ms = sum(phases.get(name, 0.0) for name in ("prefix", "forward", "backward", "update"))
    kept = phases.get("data", 0.0) if contender == "bp" else 0.0  # reading features is their work
    assert phases["train"] == pytest.approx(work_ms + kept, rel=1e-6)
    assert [row.warmup for row in first] == [True] * len(first)


def literal_losses(network: torch.nn.Module, batch: Batch) -> tuple[float, float]:
    """Before and after one step of plain gradient descent, its gradient clipped to length 2."""
    images, labels = torch.from_numpy(batch.images(slice(None))), torch.from_numpy(batch.labels(slice(None)))
    chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    before = torch.nn.functional.cross_entropy(network(images), labels)
    if not chosen:
        return float(before), float(before)
    gradients = torch.autograd.grad(before, chosen)
    length = float(torch.sqrt(sum(gradient.square().sum() for gradient in gradients)))
    with torch.no_grad():
        for parameter, gradient in zip(chosen, gradients, strict=True):
            parameter -= LEARNING_RATE * gradient * min(1.0, 2.0 / length)
        return float(before), float(torch.nn.functional.cross_entropy(network(images), labels))


COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


class DoubleBatch(Batch):
    """In float64 no unit lies so near to the kink of its ReLU6 that rounding decides on its gradient."""

    def images(self, rows: Any) -> Any:
        return super().images(rows).astype(np.float64)


# Of the largest entry.  Sums in another order differ.  Inductor packs frozen weights for oneDNN, which
# has no float64; in float32 one unit at a kink that falls to the other side was seen to change an entry by 2 %,
# layers without one agree to 1e-5; a scale or a micro-batch that is forgotten changes all by far more.
GRADIENT_TOLERANCES = {
    "eager": (torch.float64, 1e-10),
    "jit": (torch.float64, 1e-10),
    "compile": (torch.float32, 0.1),
}


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning("eager", True, 5),
        *(  # the compiler takes most of a minute on a busy machine
            pytest.param(Tuning(engine, False, 16), marks=[pytest.mark.slow] if engine == "compile" else [])
            for engine in ENGINES
        ),
    ],
    ids=str,
)
def test_tuned_gradients_are_those_of_autograd(
    tuning: Tuning, job: Callable[..., Job], material: Material
) -> None:
    if tuning.engine == "compile" and not any(map(shutil.which, COMPILERS)):
        pytest.skip("Inductor needs a C++ compiler")
    manifest, weights = read(material.package)
    trained = manifest.variant("bp").parameters
    given = same_batch(job("bp"), manifest)
    dtype, tolerance = GRADIENT_TOLERANCES[tuning.engine]
    kind = DoubleBatch if dtype == torch.float64 else Batch
    batch = kind(given.part, given.indices, given.flips, given.preprocessing)
    plain, tuned = (load_network(manifest, weights, trained).to(dtype) for _ in range(2))
    images, labels = torch.from_numpy(batch.images(slice(None))), torch.from_numpy(batch.labels(slice(None)))
    torch.nn.functional.cross_entropy(plain(images), labels).backward()
    parameters = dict(tuned.named_parameters())
    step = TunedStep(tuned, tuning, images[: tuning.micro_batch], keep=True)
    for _ in ("computed", "kept"):
        for parameter in parameters.values():
            parameter.grad = None
        step.run(batch, Unmetered())  # type: ignore[arg-type]
        for name, parameter in plain.named_parameters():
            if name in trained:
                scale = float(parameter.grad.abs().max())
                torch.testing.assert_close(
                    parameters[name].grad, parameter.grad, rtol=0, atol=tolerance * scale
                )


@pytest.mark.parametrize("whole_batch_mode", [False, True])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (6, 2)])
def test_torch_lance_takes_the_gradient_of_the_rebuilt_input(
    groups: int, stride: int, whole_batch_mode: bool
) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 6, 3, stride, 1, groups=groups, bias=False).double()
    x = torch.randn(8, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    sizes = zip(x.shape, (3, 4, 2, 3), strict=True)
    bases = [torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0] for n, r in sizes]
    if whole_batch_mode:
        bases[0] = torch.eye(8, dtype=torch.float64)
    given = (None if whole_batch_mode else bases[0], *bases[1:])
    y = LanceConv(conv, given)(x)
    dy = torch.randn_like(y)
    found_dx, found_dw = torch.autograd.grad(y, (x, conv.weight), dy)
    # Literally: project every mode and back, then the exact gradient with that input.
    rebuilt = torch.einsum("bchw,bB,cC,hH,wW->BCHW", x, *(basis @ basis.T for basis in bases)).detach()
    (expected_dw,) = torch.autograd.grad(conv(rebuilt), conv.weight, dy)
    (expected_dx,) = torch.autograd.grad(conv(x), x, dy)
    torch.testing.assert_close(found_dx, expected_dx)
    torch.testing.assert_close(found_dw, expected_dw)


@pytest.mark.parametrize("method", ["bp", "lance"])
@pytest.mark.parametrize("micro_batch", [5, 16])
def test_weight_graphs_give_whole_weight_gradients(method: str, micro_batch: int, material: Material) -> None:
    with Bundle(material.package) as bundle:
        manifest, variant = bundle.manifest, bundle.manifest.variant(method)
        projections = load_projections(bundle, variant)
    graphs = weight_graphs(manifest, variant)
    parts = invented_parts(manifest, variant, micro_batch)
    found = WeightWork(graphs, projections, variant, 1).run(parts)
    layers = {layer.name: layer for layer in manifest.layers}
    for plan in variant.layers:
        layer = layers[plan.layer]
        x, dy = (whole(parts, name, sizes) for name, sizes in (
            (input_name(layer.name), layer.input_shape), (output_gradient_name(layer.name), layer.output_shape)
        ))  # fmt: skip
        if method == "lance":
            x = rebuild(x, layer.name, projections)
        geometry = (layer.stride, layer.padding[:2], layer.dilation, layer.groups)
        expected = torch.nn.grad.conv2d_weight(x, layer.weight_shape, dy, *geometry).numpy()
        # float32 sums of up to 16 x 9 products in another order, against the largest entry.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[gradient_name(layer.weight)], expected, atol=2e-5 * scale)


def whole(parts: list[tuple[slice, dict[str, Any]]], name: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """The batch `[N, C, H, W]`, float64, from micro-batches with channels or samples outside."""
    values = [torch.from_numpy(values[name]).double() for _, values in parts]
    samples = [rows.stop - rows.start for rows, _ in parts]
    ordered = [
        value if value.shape == (count, *sizes) else value.transpose(0, 1)
        for value, count in zip(values, samples, strict=True)
    ]
    return torch.cat(ordered)


def rebuild(x: torch.Tensor, layer: str, projections: dict[str, Any]) -> torch.Tensor:
    for mode in range(4):
        if f"{layer}/U{mode}" in projections:
            basis = torch.from_numpy(projections[f"{layer}/U{mode}"]).double()
            x = torch.tensordot(x, basis @ basis.T, dims=([mode], [0])).movedim(-1, mode)
    return x


def test_projections_of_torch_lance_are_the_packages(job: Callable[..., Job], material: Material) -> None:
    manifest, _ = read(material.package)
    found = lance_projections(job("torch-lance"))
    for plan in manifest.variant("lance").layers:
        columns = [None if matrix is None else matrix.shape[1] for matrix in found[plan.layer]]
        assert columns[1:] == list(plan.ranks[1:])
        assert columns[0] in (None, plan.ranks[0])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "mcunet", "efficientnet-lite0"])
def test_no_batch_norm_is_left_in_the_tuned_network(name: str) -> None:
    torch.manual_seed(0)
    network = ZOO[name].build(5).double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)  # far from the identity that they begin as
    convs = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    for conv in convs:
        conv.weight.requires_grad_(conv in convs[-4:])
    for parameter in network.parameters():
        if parameter.ndim != 4:
            parameter.requires_grad_(False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = network(images)
    fuse_batch_norm(network)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert sum(isinstance(module, ScaledConv) for module in network.modules()) == 4
    prefix, tail = split(network)
    for found in (network(images), tail(*prefix(images))):
        # Scales in another order, in float64 through up to 53 layers.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


def test_a_batch_norm_behind_a_shared_convolution_stays() -> None:
    network = SharedConv().eval()
    images = torch.randn(1, 3, 4, 4)
    expected = network(images)
    fuse_batch_norm(network)
    assert isinstance(network.norm, torch.nn.BatchNorm2d)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=0)


class SharedConv(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
        torch.nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + self.norm(y)


def test_torch_lance_refuses_convolutions_with_a_padding_of_their_own() -> None:
    network = ZOO["efficientnet-lite0"].build(5)
    with pytest.raises(ModelError, match=r"_conv_head: expected an nn.Conv2d, found a SameConv2d, .*--model"):
        use_lance(network, {"_conv_head": (None, None, None, None)})


# --- processes -----------------------------------------------------------------------------------------


def test_a_process_reports_its_own_peak_memory(job: Callable[..., Job]) -> None:
    rows = measure(job("weights-bp", steps=2))
    assert {row.phase for row in rows} == {"weights"}
    assert [row.warmup for row in rows] == [True, False, False]
    (peak,) = {row.peak_rss_kib for row in rows}
    assert peak is not None
    bare = watch([sys.executable, "-c", f"import time; time.sleep({HELD_S})"]).peak_rss_kib
    assert bare is not None
    assert peak > 2 * bare  # NumPy and onnxruntime are each as large as the interpreter


HELD_S = 0.5  # many polls long


@pytest.mark.parametrize("released", [False, True])
def test_the_peak_is_the_memory_that_a_process_touched(released: bool) -> None:
    lines = ["import time", "held = b'x' * (200 << 20)", f"time.sleep({HELD_S})"]
    lines += ["del held", f"time.sleep({HELD_S})"] if released else []
    end = watch([sys.executable, "-c", "\n".join(lines)])
    assert end.code == 0
    assert end.peak_rss_kib is not None
    assert 200 * 1024 < end.peak_rss_kib < 300 * 1024  # the bytes and an interpreter of some 10 MiB


def test_commands_are_timed(job: Callable[..., Job], tmp_path: Path) -> None:
    peaks = {}
    for contender, phase in (("help", "start"), ("ready", "ready"), ("train", "train")):
        folder = tmp_path / contender
        folder.mkdir()
        work(job(contender), folder / "rows.csv")
        rows = list(read_rows(folder / "rows.csv", PeerRow))
        assert [(row.phase, row.warmup) for row in rows] == [(phase, True), (phase, False)]
        assert all(row.latency_ms > 0 for row in rows)
        peaks[contender] = max(row.peak_rss_kib or 0 for row in rows)
    assert peaks["train"] > peaks["help"] + 10 * 1024 > 10 * 1024  # onnxruntime and its sessions


def test_a_failure_says_who_and_why(job: Callable[..., Job]) -> None:
    with pytest.raises(BenchmarkError, match=r"onnxruntime, micro-batch 5: /nowhere/pkg.tar: .*"):
        measure(job("onnxruntime", layers=0, package="/nowhere/pkg.tar"))
    assert reason(Watched(-9, "", None)) == "the kernel ended the process, for want of memory most likely"
    assert reason(Watched(3, "Traceback\nValueError: odd\n", None)) == "ValueError: odd"
    assert reason(Watched(3, "", None)) == "ended with code 3"


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.process.LIMIT_S", 0.1)
    with pytest.raises(BenchmarkError, match="not done after 0 s; ended it"):
        watch([sys.executable, "-c", "import time; time.sleep(60)"])


# --- plan and search -----------------------------------------------------------------------------------

OPTIONS = Options(layers=(LAYERS,), micro_batch=8, threads=1, rounds=3, quick=False)
TUNINGS = {False: Tuning("jit", False, 16), True: Tuning("eager", False, 16)}


def test_every_round_has_the_same_settings_from_another_start(material: Material) -> None:
    manifest, _ = read(material.package)
    first, second = (plan_round(OPTIONS, manifest, material, TUNINGS, number) for number in (1, 2))
    assert sorted(one.text() for one in first) == sorted(one.text() for one in second)
    assert first[0].text() != second[0].text()
    contenders = {one.contender for one in first}
    assert contenders == set(CONTENDERS) - {"asi", "hosvd"}  # the package holds lance and bp alone
    tuned = {one.cached: one.tuning for one in first if one.contender == "torch-tuned"}
    assert tuned == TUNINGS


def test_layers_that_the_package_lacks_are_refused(material: Material) -> None:
    manifest, _ = read(material.package)
    with pytest.raises(ArtifactError, match="with --layers 4, not 2"):
        plan_round(replace(OPTIONS, layers=(2,)), manifest, material, TUNINGS, 1)


def test_candidates_fit_the_batch_and_stand_once() -> None:
    for cached in (False, True):
        for quick in (False, True):
            found = candidates(cached, quick, 16)
            assert len(set(found)) == len(found)
            assert max(tuning.micro_batch for tuning in found) <= 16


def test_the_search_finds_the_fastest_and_keeps_failures(job: Callable[..., Job]) -> None:
    latencies = {"eager": 30.0, "jit": 20.0}

    def run(one: Job) -> tuple[PeerRow, ...]:
        assert one.tuning is not None
        if one.tuning.engine not in latencies:
            raise BenchmarkError("no compiler")
        return (row(latency_ms=latencies[one.tuning.engine]),)

    said: list[str] = []
    tunings = [Tuning(engine, False, 8) for engine in ("compile", "eager", "jit")]
    trials = search(job("torch-tuned"), tunings, said.append, run)
    assert [(trial.tuning.engine, trial.train_ms) for trial in trials] == [
        ("jit", 20.0), ("eager", 30.0), ("compile", None)
    ]  # fmt: skip
    assert said[0] == "tuning PyTorch, 1 of 3: compile, micro-batch 8: no compiler"
    latencies.clear()
    with pytest.raises(BenchmarkError, match="no setting of PyTorch works here: no compiler"):
        search(job("torch-tuned"), tunings, said.append, run)


def test_a_contender_that_fails_is_left_out_and_named(material: Material, tmp_path: Path) -> None:
    manifest, _ = read(material.package)

    def run(one: Job) -> tuple[PeerRow, ...]:
        if one.contender == "torch-bp":
            raise BenchmarkError("no memory")
        return (row(contender=one.contender, layers=one.layers, cached=one.cached),)

    said: list[str] = []
    result = compare(OPTIONS, manifest, material, tmp_path / "steps.csv", said.append, run)
    assert result.failures == ("no memory",)
    assert said.count("not measured: no memory") == 1
    assert list(read_rows(tmp_path / "steps.csv", PeerRow)) == list(result.rows)
    per_contender = [one.contender for one in result.rows]
    assert per_contender.count("onnxruntime") == OPTIONS.rounds


# --- report --------------------------------------------------------------------------------------------


def row(**values: Any) -> PeerRow:
    base = PeerRow(
        contender="lance", layers=4, micro_batch=8, cached=False, tuning="", batch_size=128, threads=2, round=1,
        step=2, warmup=False, phase="train", latency_ms=10.0, peak_rss_kib=100 * 1024, loss=None,
        saved_bytes=None,
    )  # fmt: skip
    return replace(base, **values)


def test_summaries_leave_warm_ups_out() -> None:
    rows = [row(latency_ms=99.0, warmup=True), *(row(latency_ms=value) for value in (8.0, 10.0, 15.0))]
    (summary,) = summarise(rows)
    assert (summary.n, summary.p50_ms, summary.min_ms, summary.max_ms) == (3, 10.0, 8.0, 15.0)
    assert summary.spread == pytest.approx(np.std([8, 10, 15], ddof=1) / 11)


def test_the_report_has_medians_ratios_and_targets() -> None:
    rows = [
        row(),
        row(phase="backward", latency_ms=3.0),
        row(contender="torch-bp", micro_batch=128, latency_ms=70.0, peak_rss_kib=800 * 1024),
        row(contender="onnxruntime", layers=0, latency_ms=8.0),
        row(contender="onnxruntime", layers=0, phase="forward", latency_ms=8.0),
        row(contender="weights-lance", phase="weights", latency_ms=2.0),
        row(contender="weights-bp", phase="weights", latency_ms=7.0),
        row(contender="help", layers=0, micro_batch=0, phase="start", latency_ms=250.0),
    ]
    text = report(summarise(rows), (), ("noise",), "Measured on a test.")
    assert text.startswith("Measured on a test.\n\n> noise\n\n### 4 layers, whole network in every step\n")
    assert "| LANCE | 8 | - | - | - | 3.0 | - | 10.0 | 1.00x | 100.00 MiB | - |" in text
    assert "| PyTorch BP, eager | 128 | - | - | - | - | - | 70.0 | 7.00x | 800.00 MiB | - |" in text
    assert "| 4 | 8 | 2.00 | 7.00 | 3.50x |" in text
    assert "| lance-device --help | 0.25 s | 100.00 MiB |" in text
    assert "| LANCE step against ONNX Runtime's forward, 4 layers | <= 1.10x | 1.25x | **missed** |" in text
    assert "| LANCE step against ONNX Runtime's forward, 2 layers | <= 1.10x | not measured |  |" in text
    assert "| PyTorch BP, eager, against LANCE step, 4 layers | >= 5.50x | 7.00x | met |" in text
    assert "4 layers, PyTorch without a cache, LANCE with | >= 50.00x | not measured |  |" in text


def test_a_cache_is_compared_with_a_cache_for_information() -> None:
    rows = [row(cached=True), row(contender="torch-tuned", cached=True, latency_ms=25.0)]
    text = report(summarise(rows), (), (), "")
    line = "for information: PyTorch BP, best-tuned, against LANCE step, 4 layers, both with a cache"
    assert f"| {line} | - | 2.50x |  |" in text
    assert Target("", None, "x", False, lambda figures: None).is_met(0.0)


@pytest.mark.parametrize(
    ("budgeted", "by_energy", "by_budget"),
    [
        ((), "0.50 MiB | met", "not measured here: calibrate with --memory-budget | "),
        ((4,), "not measured | ", "0.50 MiB | **missed**"),
    ],
)
def test_saved_bytes_are_judged_by_how_ranks_were_chosen(
    budgeted: tuple[int, ...], by_energy: str, by_budget: str
) -> None:
    text = report(summarise([row(saved_bytes=1 << 19)]), (), (), "", budgeted=budgeted)
    assert (
        f"| saved bytes, LANCE, 4 layers, micro-batch 8, ranks by energy | <= 0.75 MiB | {by_energy} |" in text
    )
    line = "the same with budgeted ranks (whose accuracy is not measured here)"
    assert f"| {line} | <= 0.25 MiB | {by_budget} |" in text


def test_targets_compare_with_the_best_other_method() -> None:
    rows = [
        row(cached=True),
        row(cached=True, contender="bp", latency_ms=9.0),
        row(cached=True, contender="hosvd", latency_ms=50.0),
    ]
    (target,) = (one for one in TARGETS if one.figure.startswith("LANCE step against any other"))
    value = target.measured(Figures(summarise(rows)))
    assert value == pytest.approx(10 / 9)
    assert not target.is_met(10 / 9)
    assert Target("", 2.0, "x", False, lambda figures: None).is_met(2.0)


def test_unsteady_times_and_other_losses_are_warned_of() -> None:
    rows = [row(latency_ms=value) for value in (8.0, 10.0, 15.0)]
    rows += [row(contender=name, step=1, warmup=True, loss=2.3) for name in ("lance", "bp", "torch-bp")]
    rows += [row(contender="torch-tuned", step=1, warmup=True, loss=2.4)]
    spread, loss = warnings_of(rows, summarise(rows))
    assert spread.startswith(
        "times of 1 settings vary by more than 10% (standard deviation), most those of LANCE, 33%"
    )
    assert loss == (
        "PyTorch BP, best-tuned, 4 layers: the loss of the first step is 2.40000, that of the others 2.30000:"
        " it does not compute the same, its times mean nothing"
    )


def losses(contender: str, *values: float, **cells: Any) -> list[PeerRow]:
    steps = enumerate(values, start=1)
    return [row(contender=contender, step=n, warmup=n == 1, loss=loss, **cells) for n, loss in steps]


def test_a_wrong_gradient_is_warned_of() -> None:
    rows = [*losses("bp", 2.3, 2.1, 1.9), *losses("torch-bp", 2.3, 2.1), *losses("torch-tuned", 2.3, 2.25, 2.2)]
    rows += losses("lance", 2.3, 2.15) + losses("torch-lance", 2.3, 2.15)  # another gradient, by design
    (text,) = warnings_of(rows, ())
    assert text == (
        "PyTorch BP, best-tuned, 4 layers: the loss of step 2 is 2.25000, that of the others 2.10000:"
        " it does not compute the same, its times mean nothing"
    )


def test_a_wrong_loss_of_one_round_is_warned_of() -> None:
    rows = [
        one
        for n in (1, 2, 3)
        for one in losses("bp", 2.3, 2.1, round=n) + losses("torch-bp", 2.3, 2.1, round=n)
    ]
    assert warnings_of(rows, ()) == ()
    rows[0] = replace(rows[0], loss=2.4)
    (text,) = warnings_of(rows, ())
    assert text.startswith("BP, 4 layers: the loss of the first step is 2.40000, that of the others 2.30000")
    rows[0] = replace(rows[0], loss=float("nan"))
    (text,) = warnings_of(rows, ())
    assert text.startswith("BP, 4 layers: the loss of the first step is nan, that of the others 2.30000")


def test_losses_that_do_not_move_are_warned_of() -> None:
    assert warnings_of([*losses("hosvd", 2.3, 2.3001), *losses("onnxruntime", 2.3, 2.3, layers=0)], ()) == (
        "hosvd, 4 layers: the loss of step 2 is still that of the first: it does not show whether gradients"
        " are right",
    )


def test_a_busy_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.26, 0.0, 0.0))
    assert about_load() == "other programs keep 1.3 cores busy; times will be too long and vary"
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 9.0, 9.0))
    assert about_load() is None


# --- material and command line -------------------------------------------------------------------------


def test_photographs_are_always_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_photos(tmp_path / name, ("a", "b"), 3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jpg"))
    assert len(files) == 6
    contents = [(tmp_path / "one" / path).read_bytes() for path in files]
    assert contents == [(tmp_path / "two" / path).read_bytes() for path in files]
    assert len(set(contents)) == 6


@pytest.mark.parametrize(("batch_size", "classes"), [(1, 2), (1, 10), (7, 3), (128, 10), (128, 1000)])
def test_there_are_photographs_for_all_batches_of_a_calibration(
    batch_size: int, classes: int, tmp_path: Path
) -> None:
    for label in range(classes):
        (tmp_path / f"{label:04}").mkdir()
        for index in range(photos_per_class(batch_size, classes, SPLIT)):
            (tmp_path / f"{label:04}/{index:03}.jpg").touch()
    images = len(open_dataset(tmp_path, SPLIT).train)
    assert BATCHES * batch_size <= images < BATCHES * batch_size + 2 * classes


def test_photographs_need_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(LanceError) as caught:
        write_photos(tmp_path / "photos", ("a",), 1)
    assert str(caught.value) == (
        "benchmarks: needs the sample photographs of scikit-learn, which is not installed;"
        " pip install scikit-learn"
    )


def test_networks_of_others_are_refused(material: Material) -> None:
    manifest, weights = read(material.package)
    with pytest.raises(
        ModelError, match=r"--artifact of model net.py:make: expected one of mcunet, .*; calibrate one of these"
    ):
        load_network(replace(manifest, model="net.py:make"), weights, ())


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.csv").touch()
    for command in (main, ort_main):
        assert command(["--out", str(tmp_path)]) == 8
        assert f"--out {tmp_path}: expected a new or empty folder, found files in it" in capsys.readouterr().err
        assert command(["--out", str(tmp_path / "kept.csv/out")]) == 8
        assert (
            "kept.csv/out: cannot make this folder (Not a directory); name another" in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "0"], "expected counts from 1 such as 4, 2,4 or 1-10, found '0'"),
        (["--rounds", "x"], "expected a whole number from 1, found 'x'"),
    ],
)
def test_odd_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ort_main(["--micro-batch", "0"])
    assert "expected a whole number from 1, found '0'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "mcunet-10fps-vww", "--weights", "random", "--batch-size", "8", "--threads", "1"]
    assert main(["--quick", *small, "--layers", "2", "--out", str(tmp_path / "out")]) == 0
    rows = list(read_rows(tmp_path / "out" / "steps.csv", PeerRow))
    assert {one.contender for one in rows} == set(CONTENDERS)
    text = capsys.readouterr().out
    assert "### 2 layers, features of the frozen part kept" in text
    assert "does not compute the same" not in text
    assert "not measured:" not in text


# --- beside ONNX Runtime's training API (the measurements themselves: tests/ort_training) ---


def ort_row(contender: str, step: int, latency_ms: float, loss: float = 2.0) -> StepRow:
    return StepRow(contender, 1, step, step == 1, latency_ms, loss, 100 << 10, 40 << 10)


def test_the_table_beside_the_training_api_has_medians_without_warm_ups() -> None:
    text = ort_report([ort_row("LANCE", step, ms) for step, ms in enumerate((900, 101, 102, 99), 1)], "Here.")
    assert text.startswith("Here.\n\n| ")
    assert "| LANCE | 101 | 99 | 2% | 100.00 MiB | 40.00 MiB |" in text
    assert ">" not in text


def test_the_table_beside_the_training_api_warns_of_spread_and_of_other_losses() -> None:
    rows = [ort_row("steady", step, 100) for step in (1, 2, 3)]
    rows += [ort_row("jumpy", step, ms) for step, ms in ((1, 100), (2, 100), (3, 200))]
    rows += [ort_row("other", step, 100, loss=2.1) for step in (1, 2, 3)]
    text = ort_report(rows, "Here.")
    assert "> times vary by more than 10%: jumpy\n" in text
    assert (
        "> other: the loss of the first step is 2.10000, that of the others 2.00000: its times mean nothing"
        in text
    )
    assert text.count("mean nothing") == 1


def test_torch_lance_refuses_linear_layers() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"0: expected an nn.Conv2d, found a Linear, .*--model"):
        use_lance(network, {"0": (None, None, None, None)})
