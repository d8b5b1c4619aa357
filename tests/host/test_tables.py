"""What is printed about a package: figures in the right cells, aligned, at most 120 characters wide."""

import re
from dataclasses import replace

import pytest

from lance_edge.accounting import bp_activation_bytes, core_bytes
from lance_edge.input_spec import Preprocessing, Split
from lance_edge.manifest import SCHEMA_VERSION, Layer, LayerPlan, Manifest, Member, TensorSpec, Variant
from lance_host.budget import BudgetPlan
from lance_host.error_table import Candidate
from lance_host.perplexity import LayerChoices, SearchResult
from lance_host.search_tables import budget_table
from lance_host.tables import layer_table, package_table
from lance_host.text import human_bytes, human_macs

BATCH = 128
EXPAND = "blocks.17.mobile_inverted_conv.inverted_bottleneck.conv"
POINT = "blocks.17.mobile_inverted_conv.point_linear.conv"


def layer(name: str, channels: int, out: int) -> Layer:
    return Layer(
        name=name,
        weight=f"{name}.weight",
        weight_shape=(out, channels, 1, 1),
        input_shape=(channels, 5, 5),
        output_shape=(out, 5, 5),
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
    )


LAYERS = (layer(EXPAND, 96, 480), layer(POINT, 480, 160))
RANKS = ((72, 20, 4, 4), (2, 50, 3, 3))
ENERGY = ((0.7000000001, 0.9999, 0.88, 1.0), (0.69999999999999, 0.7123, 0.9, 0.7))


def variant(method: str, graph_macs: dict[str, int]) -> Variant:
    plans = tuple(
        LayerPlan(one.name, ranks, kept, core_bytes(ranks), 2_000_000, 30_000)
        if method == "lance"
        else LayerPlan(one.name, (), (), bp_activation_bytes(one, BATCH), 1_000_000, 40_000)
        for one, ranks, kept in zip(LAYERS, RANKS, ENERGY, strict=True)
    )
    return Variant(
        method=method,
        energy=0.7 if method == "lance" else None,
        schedule="one pass",
        graphs={role: f"graphs/{role}.onnx" for role in graph_macs},
        parameters=tuple(one.weight for one in LAYERS),
        layers=plans,
        boundary=(),
        activations=(),
        saved=(TensorSpec("mask", ("N", 1024), "uint8"),),
        statistics=(TensorSpec("core", (256,), "float32"),),
        batch_projections=(),
        projections=(),
        graph_macs=graph_macs,
    )


def package() -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by="lance-host 0.1.0",
        model="mcunet",
        weights_source="mcunet-256kb-1mb_imagenet.pth",
        classes=("cat", "cow", "dog", "elephant"),
        preprocessing=Preprocessing(160, 182, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        split=Split(3, 0.25, 0.1),
        seed=7,
        mode="channel",
        energy=0.7,
        batch_size=BATCH,
        calibration_batches=50,
        parameters=(TensorSpec("head.weight", (4, 160), "float32"), TensorSpec("head.bias", (4,), "float32")),
        layers=LAYERS,
        variants=(
            variant("bp", {"prefix": 5_000_000_000, "forward": 7_000_000, "predict": 900}),
            variant("lance", {"prefix": 5_000_000_000, "forward": 8_000_000, "gradient": 1_234}),
        ),
        members=(
            Member("graphs/prefix.onnx", 3 << 20, "0" * 64),
            Member("weights.npz", 512, "1" * 64),
        ),
    )


def row(table: str, label: str) -> list[str]:
    """The cells of the line that begins with `label`."""
    (line,) = (line for line in table.splitlines() if line.startswith(label))
    return line[len(label) :].split()


def words(text: str) -> list[str]:
    return text.split()


# --- layers


def test_a_layers_row_holds_shape_ranks_energy_bytes_and_ratio() -> None:
    cells = row(layer_table(package()), POINT)
    # 128 * 480 * 25 * 4 bytes; 2 * 50 * 3 * 3 * 4 bytes
    assert cells == words("480x5x5 2 50 3 3 70 71 90 70 5.86 MiB 3.52 KiB 1706.7x")


def test_energy_is_whole_percent_and_100_means_all() -> None:
    assert row(layer_table(package()), EXPAND)[5:9] == ["70", "99", "88", "100"]


def test_the_last_row_is_the_total() -> None:
    table = layer_table(package())
    assert table.splitlines()[-1].startswith("total")
    # (96 + 480) * 25 * 128 * 4 bytes; (72 * 20 * 4 * 4 + 900) * 4 bytes
    assert row(table, "total") == words("7.03 MiB 93.52 KiB 77.0x")


def test_the_heading_says_batch_threshold_and_batches() -> None:
    heading = layer_table(package()).splitlines()[0]
    assert heading == ("2 trainable layers, batch size 128, energy threshold 0.7, 50 calibration batches.")
    one = replace(package(), calibration_batches=1)
    assert layer_table(one).splitlines()[0].endswith("1 calibration batch.")


def test_columns_are_aligned() -> None:
    table = layer_table(package()).splitlines()
    header = next(i for i, line in enumerate(table) if line.startswith("layer"))
    body = [table[header], *table[header + 2 :]]
    assert set(table[header + 1]) == {"-"}
    assert len({len(line) for line in body}) == 1
    assert len({line.index("MiB") for line in body[1:] if line.count("MiB") == 1}) == 1


def test_names_of_published_networks_stay_whole_and_longer_ones_keep_both_ends() -> None:
    manifest = package()
    assert POINT in layer_table(manifest)
    long_name = f"features.{'x' * 80}.conv"
    long_layer = replace(LAYERS[1], name=long_name, input_shape=(1280, 112, 112))
    wide = (LayerPlan(long_name, (128, 1280, 112, 112), (1.0,) * 4, 8_220_835_840, 0, 0),)
    lance = replace(manifest.variant("lance"), layers=wide)
    table = layer_table(replace(manifest, layers=(long_layer,), variants=(lance,)))
    assert max(map(len, table.splitlines())) <= 120
    (line,) = (line for line in table.splitlines() if "1280x112x112" in line)
    assert line.startswith("features.")
    assert "..." in line
    assert "x.conv " in line


def test_a_package_without_ranks_shows_bp_alone() -> None:
    manifest = package()
    table = layer_table(replace(manifest, variants=(manifest.variant("bp"),)))
    assert row(table, POINT) == words("480x5x5 5.86 MiB")
    assert row(table, "total") == words("7.03 MiB")
    assert "rank" not in table.lower()


def test_a_package_that_trains_the_head_alone_says_so() -> None:
    assert layer_table(replace(package(), layers=())) == (
        "No trainable layers: the classifier alone trains (the baseline)."
    )


def test_ranks_of_a_budget_are_not_said_to_be_those_of_an_energy() -> None:
    manifest = package()
    lance = replace(manifest.variant("lance"), budget_bytes=96 << 10)
    budgeted = replace(manifest, variants=(manifest.variant("bp"), lance))
    heading = layer_table(budgeted).splitlines()[0]
    assert heading == ("2 trainable layers, batch size 128, memory budget 96.00 KiB, 50 calibration batches.")
    assert row(package_table(budgeted), "compression") == words("LANCE memory budget 96.00 KiB; channel mode")
    assert "memory budget" not in package_table(manifest)


# --- budget


def budget_plan(count: int) -> BudgetPlan:
    chosen = (Candidate((128, 6, 3, 3), 12_792, 1.25), Candidate((4, 16, 1, 1), 31_784, 0.5))
    uniform = (Candidate((5, 11, 2, 1), 17_716, 2.0), Candidate((2, 3, 1, 1), 5_952, 1.5))
    choices = [
        LayerChoices(name, (best,), single, norm)
        for name, best, single, norm in zip((EXPAND, POINT), chosen, uniform, (4.0, 1.0), strict=True)
    ]
    return BudgetPlan("lance", 65_536, SearchResult(0.69996, tuple(choices[-count:])), chosen[-count:])


def test_a_budgets_table_stands_beside_that_of_one_energy() -> None:
    table = budget_table([budget_plan(2)])
    assert table.startswith(
        "LANCE, memory budget 64.00 KiB: ranks with the least error of the weight gradients,"
    )
    assert "ε 0.6999: ranks" in table
    assert row(table, POINT) == words("4 16 1 1 31.04 KiB 50.0 2 3 1 1 5.81 KiB 150.0")
    assert row(table, "total") == words("43.53 KiB 35.0 23.11 KiB 70.0")  # (1.25 + 0.5) / 5, (2 + 1.5) / 5
    assert max(map(len, table.splitlines())) <= 120


def test_fewer_layers_are_a_line_each() -> None:
    last = budget_table([budget_plan(1), budget_plan(2)]).splitlines()[-1]
    assert last == "1 layer: error 50.0 %, with ε 0.6999 150.0 %"


# --- package


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("model", "mcunet"),
        ("weights ", "mcunet-256kb-1mb_imagenet.pth"),
        ("classes", "4: cat, cow, dog, elephant"),
        ("batch size", "128"),
        ("compression", "LANCE energy threshold 0.7; channel mode"),
        ("calibration", "50 batches, seed 7"),
        (
            "preprocessing",
            "short side 182 px (bilinear), centre crop 160 px, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5",
        ),
        ("split", "seed 3, 25% for testing, then 10% of the rest for validation"),
        ("trainable", "2 layers and head.weight, head.bias: 2 tensors, 644 values"),
        ("created by", f"lance-host 0.1.0, schema {SCHEMA_VERSION}"),
    ],
)
def test_says_how_the_package_was_made(label: str, text: str) -> None:
    assert " ".join(row(package_table(package()), label)) == text


@pytest.mark.parametrize(
    ("label", "bp", "lance"),
    [
        ("activation bytes", "7.03 MiB", "93.52 KiB"),
        ("saved bytes, micro-batch 8", "9.00 KiB", "9.00 KiB"),  # 8 masks of 1 KiB, statistics of 1 KiB
        ("saved bytes, whole batch", "129.00 KiB", "129.00 KiB"),
        ("of which statistics", "1.00 KiB", "1.00 KiB"),
        ("multiply-adds, prefix graph", "5.00 G", "5.00 G"),
        ("multiply-adds, forward graph", "7.00 M", "8.00 M"),
        ("multiply-adds, gradient graph", "-", "1.23 k"),
        ("multiply-adds, predict graph", "900", "-"),
        ("multiply-adds, all of a step", "5.01 G", "5.01 G"),
        ("paper's multiply-adds, forward", "2.00 M", "4.00 M"),
        ("paper's multiply-adds, weight gradient", "80.00 k", "60.00 k"),
    ],
)
def test_puts_the_methods_side_by_side(label: str, bp: str, lance: str) -> None:
    assert row(package_table(package()), label) == words(f"{bp} {lance}")


def test_lists_the_files_and_their_total() -> None:
    table = package_table(package())
    assert row(table, "graphs/prefix.onnx") == ["3.00", "MiB"]
    assert row(table, "weights.npz") == ["512", "B"]
    assert row(table, "total") == ["3.00", "MiB"]


def test_a_small_batch_quotes_its_own_micro_batch() -> None:
    assert "saved bytes, micro-batch 4 " in package_table(replace(package(), batch_size=4))


def test_long_texts_are_wrapped_and_cut() -> None:
    manifest = replace(package(), classes=tuple(f"class {i}" for i in range(1000)), weights_source="w" * 300)
    table = package_table(manifest)
    assert max(map(len, table.splitlines())) <= 120
    assert "1000: class 0, class 1," in table
    assert " ...\n" in table


# --- several counts of layers


def choice() -> Manifest:
    """The package with a further variant that trains one layer, for one of the methods."""
    one = package().variant("lance")
    return replace(package(), variants=(*package().variants, replace(one, layers=one.layers[1:])))


def test_several_counts_are_rows_and_methods_columns() -> None:
    table = package_table(choice())
    assert "1 to 2 layers and head.weight, head.bias" in table
    _, activation, saved, macs = re.split(r"\n(?=activation bytes, |saved bytes, |multiply-adds of)", table)
    assert activation.startswith("activation bytes, batch 128:\n")
    assert row(activation, "layers") == ["BP", "LANCE"]
    assert row(activation, "1 ") == words("- 3.52 KiB")
    assert row(activation, "2 ") == words("7.03 MiB 93.52 KiB")
    assert row(saved, "2 ") == words("9.00 KiB 9.00 KiB")
    assert row(macs, "1 ") == words("- 5.01 G")


def test_several_counts_show_the_layers_of_the_largest() -> None:
    assert layer_table(choice()) == layer_table(package())


def test_many_files_are_summed_up_by_folder() -> None:
    graphs = tuple(Member(f"graphs/{i}.onnx", 1024, "0" * 64) for i in range(50))
    table = package_table(replace(package(), members=(*graphs, Member("weights.npz", 512, "1" * 64))))
    assert row(table, "graphs/, 50 files") == ["50.00", "KiB"]
    assert row(table, "weights.npz") == ["512", "B"]
    assert row(table, "total") == ["50.50", "KiB"]


# --- units


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (6_144_000, "5.86 MiB"), (3 << 30, "3.00 GiB")],
)
def test_bytes_are_readable(number: int, text: str) -> None:
    assert human_bytes(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (12_345_678, "12.35 M"), (2 * 10**9, "2.00 G")],
)
def test_multiply_adds_are_readable(number: int, text: str) -> None:
    assert human_macs(number) == text
