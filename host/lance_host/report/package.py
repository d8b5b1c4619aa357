"""Ranks and spectra of the trained layers, from the package that a run was trained from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError
from lance_edge.manifest import Layer, LayerPlan, Variant
from lance_edge.report.colours import MODES
from lance_edge.report.names import method_name
from lance_edge.report.plots import Bar, BarGroup, BarPlot, Line, LinePlot, Plot, Section, Table, Value
from lance_edge.report.views import View

SPECTRA = "spectra.npz"
MODE_NAMES = {
    4: ("batch", "channels", "height", "width"),
    3: ("batch", "tokens", "features"),
    2: ("batch", "features"),
}
MOST_LAYERS = 12  # of which a figure is drawn
TITLE = "Ranks and spectra"
MISSING = (
    "With the package (--artifact pkg.tar, or pkg.tar beside the runs) its ranks and spectra are shown here."
)


def package_section(views: Sequence[View], artifact: Path | None) -> tuple[Section, tuple[str, ...]]:
    """The section, and what is to be said of the package.

    Args:
        artifact: the package; `None`: the one that a run names, if it is found and is still the same.

    Raises:
        ArtifactError: if the named package cannot be read.
    """
    if artifact is not None:
        with Bundle(artifact) as bundle:
            return _section(bundle, views), _about_identity(bundle, views)
    notes = []
    for path, identity in _candidates(views):
        try:
            with Bundle(path) as bundle:
                if bundle.sha256 == identity:
                    return _section(bundle, views), ()
            notes.append(f" {path} is there, but is not the package of these runs.")
        except ArtifactError as error:
            notes.append(f" {error}.")
    missing = MISSING + "".join(dict.fromkeys(notes))
    return Section(TITLE, "What calibration found of each trained layer.", (), missing=missing), ()


def _candidates(views: Sequence[View]) -> Iterator[tuple[Path, str]]:
    """Where a package could be: as the run says, in its folder, beside it, above it."""
    for view in views:
        named, identity = view.fact("artifact", "path"), view.fact("artifact", "identity_sha256")
        if not isinstance(named, str) or not isinstance(identity, str) or view.files.record is None:
            continue
        folder = view.files.record.resolve().parent
        around = (folder, folder.parent, folder.parent.parent)
        places = (Path(named), *(place / Path(named).name for place in around))
        for path in dict.fromkeys(places):
            if path.is_file():
                yield path, identity


def _about_identity(bundle: Bundle, views: Sequence[View]) -> tuple[str, ...]:
    others = [
        view.name
        for view in views
        if (found := view.fact("artifact", "identity_sha256")) and found != bundle.sha256
    ]
    if not others:
        return ()
    return (f"{bundle.path} is not the package that {', '.join(others)} used: its ranks may be others.",)


def _section(bundle: Bundle, views: Sequence[View]) -> Section:
    variant = _variant(bundle, views)
    manifest = bundle.manifest
    layers = {layer.name: layer for layer in manifest.layers}
    plans = [plan for plan in variant.layers if plan.ranks]
    text = (
        f"What calibration on {manifest.calibration_batches} batches of {manifest.batch_size} found"
        f" ({method_name(variant.method)}, {_chosen_by(variant)}). A rank is how many directions of a mode"
        " are kept."
    )
    missing = f"{bundle.path} compresses nothing: it holds plain backpropagation alone."
    if not plans:
        return Section(TITLE, text, (), missing=missing)
    spectra = _spectra_plots(bundle, plans, layers, variant)
    table = _rank_table(plans, layers, manifest.batch_size)
    bars = _rank_bars(plans, layers, manifest.batch_size)
    return Section(TITLE, text, (bars, *spectra), (table,))


def _variant(bundle: Bundle, views: Sequence[View]) -> Variant:
    """LANCE with as many layers as the runs trained, else with the most that there are."""
    variants = bundle.manifest.variants
    wanted = {setting.layers for view in views for setting in view.costs if not view.is_benchmark}
    methods = ("lance", "asi", "hosvd")
    ranked = [variant for method in methods for variant in variants if variant.method == method]
    fitting = [variant for variant in ranked if len(variant.layers) in wanted] or ranked
    first = (
        [variant for variant in fitting if variant.method == fitting[0].method] if fitting else list(variants)
    )
    return max(first, key=lambda variant: len(variant.layers))


def _chosen_by(variant: Variant) -> str:
    if variant.budget_bytes is not None:
        return f"ranks within {variant.budget_bytes / 1024:,.0f} KiB of activation bytes"
    return f"energy threshold ε {variant.energy:g}" if variant.energy is not None else "ranks of each step"


def _sizes(layer: Layer, batch_size: int) -> tuple[int, ...]:
    return (batch_size, *layer.input_shape)


def _rank_table(plans: Sequence[LayerPlan], layers: dict[str, Layer], batch_size: int) -> Table:
    """Rank of size in every mode, energy that is kept, activation bytes."""
    most = max(len(plan.ranks) for plan in plans)
    names = MODE_NAMES.get(most, tuple(f"mode {mode}" for mode in range(most)))
    rows = []
    for plan in plans:
        sizes = _sizes(layers[plan.layer], batch_size)
        cells = [f"{rank} of {size}" for rank, size in zip(plan.ranks, sizes, strict=True)]
        kept = f"{min(plan.energy_kept):.0%}" if plan.energy_kept else "-"
        padding = [""] * (most - len(cells))
        rows.append((plan.layer, *cells, *padding, kept, f"{plan.activation_bytes / 1024:.1f} KiB"))
    header = ("layer", *names, "least energy kept", "activation bytes")
    return Table("layers", header, tuple(rows), _rank_data(plans, layers, batch_size, names))


def _rank_data(
    plans: Sequence[LayerPlan], layers: dict[str, Layer], batch_size: int, names: Sequence[str]
) -> dict[str, list[Value]]:
    """The same as plain numbers; a layer without a mode has no rank there."""
    data: dict[str, list[Value]] = {"layer": [plan.layer for plan in plans]}
    for mode, name in enumerate(name.replace(" ", "_") for name in names):
        kept = [(plan.ranks, _sizes(layers[plan.layer], batch_size)) for plan in plans]
        data[f"{name}_rank"] = [ranks[mode] if mode < len(ranks) else None for ranks, _ in kept]
        data[f"{name}_size"] = [sizes[mode] if mode < len(ranks) else None for ranks, sizes in kept]
    data["least_energy_kept"] = [min(plan.energy_kept, default=None) for plan in plans]
    data["activation_bytes"] = [plan.activation_bytes for plan in plans]
    return data


def _rank_bars(plans: Sequence[LayerPlan], layers: dict[str, Layer], batch_size: int) -> BarPlot:
    groups = []
    for number, plan in enumerate(plans, start=1):
        sizes = _sizes(layers[plan.layer], batch_size)
        names = _mode_names(len(plan.ranks))
        groups.append(
            BarGroup(
                str(number),
                tuple(
                    Bar(f"{plan.layer}, {names[mode]}", (100 * rank / size,), (MODES[mode % len(MODES)],))
                    for mode, (rank, size) in enumerate(zip(plan.ranks, sizes, strict=True))
                ),
            )
        )
    names = _mode_names(max(len(plan.ranks) for plan in plans))
    return BarPlot(
        "ranks",
        "Ranks of each layer",
        "Directions that are kept of each mode of a layer's input. Layers in module order, as in the table.",
        "trained layer, the last one nearest to the head",
        "rank, % of the mode's size",
        ("rank",),
        tuple(groups),
        tuple((name, MODES[mode % len(MODES)]) for mode, name in enumerate(names)),
    )


def _mode_names(count: int) -> tuple[str, ...]:
    return MODE_NAMES.get(count, tuple(f"mode {mode}" for mode in range(count)))


def _spectra_plots(
    bundle: Bundle, plans: Sequence[LayerPlan], layers: dict[str, Layer], variant: Variant
) -> list[Plot]:
    plots: list[Plot] = []
    spectra = bundle.arrays(SPECTRA)
    for number, plan in enumerate(plans[-MOST_LAYERS:], start=max(1, len(plans) - MOST_LAYERS + 1)):
        lines: list[Line] = []
        names = _mode_names(len(plan.ranks))
        for mode, rank in enumerate(plan.ranks):
            name = f"{plan.layer}/eigenvalues{mode}"
            if name in spectra:
                values = np.asarray(spectra[name], dtype=np.float64)
                lines += _spectrum(values, rank, names[mode], MODES[mode % len(MODES)])
        rules = ((100 * variant.energy, f"ε = {variant.energy:g}"),) if variant.energy is not None else ()
        plots.append(
            LinePlot(
                f"spectrum-{number}",
                f"Spectrum of layer {number}: {plan.layer}",
                "Share of the activations' variance within the first directions of each mode; the dot is the"
                " rank.",
                "directions kept",
                "variance kept, %",
                tuple(lines),
                x_is_log=True,
                rules=rules,
            )
        )
    return [plot for plot in plots if not plot.is_empty]


def _spectrum(eigenvalues: NDArray[np.float64], rank: int, name: str, colour: str) -> list[Line]:
    """Of `[n]` eigenvalues, descending, the share in the first 1, 2, ..., n."""
    values = np.maximum(eigenvalues, 0.0)  # rounding leaves some a little below zero
    total = float(values.sum())
    if not total:
        return []
    kept = 100 * np.cumsum(values) / total
    x = tuple(float(number) for number in range(1, len(kept) + 1))
    curve = Line(f"{name}, rank {rank}", colour, x, tuple(map(float, kept)))
    if rank == 0:
        return [curve]
    return [curve, Line("", colour, (float(rank),), (float(kept[rank - 1]),), "points")]
