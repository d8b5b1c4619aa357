"""What the workstation prints about a package: plain text, at most 120 characters wide."""

import math
from collections.abc import Callable, Sequence

from lance_edge.accounting import bp_activation_bytes, bp_forward_macs
from lance_edge.input_spec import ArrayInput, InputSpec
from lance_edge.manifest import LayerPlan, Manifest, Member, Variant
from lance_host.text import (
    GAP,
    WIDTH,
    aligned,
    count,
    fact,
    grid,
    human_bytes,
    human_macs,
    percent,
    ratio,
    shorten,
    width,
)

MICRO_BATCH = 8  # the micro-batch at which a package quotes its saved bytes
MOST_FILES = 40


def layer_table(manifest: Manifest) -> str:
    """A row per trainable layer: input, ranks, energy kept, bytes of BP against the compressed method.

    The compressed method is the first variant that has ranks; without one only BP's bytes are shown.
    Long layer names are shortened in the middle where the table would be wider than 120 characters.
    """
    if not manifest.layers:
        return "No trainable layers: the classifier alone trains (the baseline)."
    method, plans = _compressed(manifest)
    stored = [bp_activation_bytes(layer, manifest.batch_size) for layer in manifest.layers]
    columns = [
        ["input", *("x".join(map(str, layer.input_shape)) for layer in manifest.layers), ""],
        ["BP", *map(human_bytes, stored), human_bytes(sum(stored))],
    ]
    if plans:
        kept = [plan.activation_bytes for plan in plans]
        columns[1:1] = [
            ["ranks", *aligned([[str(rank) for rank in plan.ranks] for plan in plans]), ""],
            ["energy %", *aligned([[percent(share) for share in plan.energy_kept] for plan in plans]), ""],
        ]
        columns += [
            [method.upper(), *map(human_bytes, kept), human_bytes(sum(kept))],
            ["ratio", *map(ratio, stored, kept), ratio(sum(stored), sum(kept))],
        ]
    room = WIDTH - sum(width(column) + len(GAP) for column in columns)
    names = [shorten(layer.name, room) for layer in manifest.layers]
    return "\n".join([_layer_heading(manifest, method), "", *grid([["layer", *names, "total"], *columns])])


def saved_line(manifest: Manifest) -> str:
    """What really crosses from forward to backward, of every method at the largest number of layers."""
    micro_batch = min(MICRO_BATCH, manifest.batch_size)
    variants = [manifest.variant(method) for method in manifest.methods]
    sizes = (
        f"{v.method.upper()} {human_bytes(v.saved_bytes(micro_batch, manifest.batch_size))}" for v in variants
    )
    return f"saved bytes at micro-batch {micro_batch}, masks and sums included: {', '.join(sizes)}"


def package_table(manifest: Manifest) -> str:
    """Everything a package says about itself: the calibration, each method's cost, the files."""
    facts = [
        ("model", manifest.model),
        ("weights", manifest.weights_source),
        ("classes", f"{len(manifest.classes)}: {', '.join(manifest.classes)}"),
        ("batch size", str(manifest.batch_size)),
        ("compression", _rules(manifest)),
        ("calibration", f"{manifest.calibration_batches} batches, seed {manifest.seed}"),
        ("preprocessing", _preprocessing(manifest.preprocessing)),
        ("split", f"seed {manifest.split.seed}, {manifest.split.test_fraction:.0%} for testing, then"
         f" {manifest.split.validation_fraction:.0%} of the rest for validation"),
        ("trainable", _trainable(manifest)),
        *_task_facts(manifest),
        ("created by", f"{manifest.created_by}, schema {manifest.schema_version}"),
    ]  # fmt: skip
    costs = grid(_cost_columns(manifest)) if len(manifest.layer_counts) == 1 else _count_tables(manifest)
    files = grid(_file_columns(manifest.members))
    return "\n".join([*(line for pair in facts for line in fact(*pair)), "", *costs, "", *files])


def _compressed(manifest: Manifest) -> tuple[str, list[LayerPlan]]:
    """The first method with ranks and its plans in the order of the layers; no plans without one."""
    for variant in manifest.variants:
        if len(variant.layers) != len(manifest.layers):
            continue
        plans = {plan.layer: plan for plan in variant.layers if plan.ranks}
        if plans:
            return variant.method, [plans[layer.name] for layer in manifest.layers]
    return "", []


def _layer_heading(manifest: Manifest, method: str) -> str:
    heading = f"{count(len(manifest.layers), 'trainable layer')}, batch size {manifest.batch_size}"
    shapes = dict.fromkeys(layer.modes for layer in manifest.layers)
    modes = dict.fromkeys(layer.modes_in(manifest.mode) for layer in manifest.layers)
    inputs = " or ".join(" x ".join(names[1:]) for names in shapes)
    if not method:
        return f"{heading}. Input is {inputs}."
    batches = count(manifest.calibration_batches, "calibration batch")
    return (
        f"{heading}, {_rank_rule(manifest, method)}, {batches}.\n"
        f"Input is {inputs}. Ranks and energy kept: {' or '.join(', '.join(names) for names in modes)}."
    )


def _rules(manifest: Manifest) -> str:
    """What chose the ranks of each method: `LANCE, ASI energy threshold 0.7; HOSVD ...; channel mode`."""
    methods: dict[str, list[str]] = {}
    for method in manifest.methods:
        if method != "bp":
            methods.setdefault(_rank_rule(manifest, method), []).append(method.upper())
    rules = [f"{', '.join(names)} {rule}" for rule, names in methods.items()]
    return "; ".join([*rules, f"{manifest.mode} mode"]) if rules else "none"


def _rank_rule(manifest: Manifest, method: str) -> str:
    variant = manifest.variant(method)
    if variant.budget_bytes is None:
        return f"energy threshold {variant.energy:g}"
    return f"memory budget {human_bytes(variant.budget_bytes)}"


def _cost_columns(manifest: Manifest) -> list[list[str]]:
    """The column of labels, then one column per variant; `-` where a variant has no such graph."""
    variants = manifest.variants
    micro_batch = min(MICRO_BATCH, manifest.batch_size)
    roles = list(dict.fromkeys(role for variant in variants for role in variant.graph_macs))
    rows: list[tuple[str, Callable[[Variant], str]]] = [
        ("activation bytes", lambda v: human_bytes(v.activation_bytes)),
        (
            f"saved bytes, micro-batch {micro_batch}",
            lambda v: human_bytes(v.saved_bytes(micro_batch, manifest.batch_size)),
        ),
        (
            "saved bytes, whole batch",
            lambda v: human_bytes(v.saved_bytes(manifest.batch_size, manifest.batch_size)),
        ),
        ("of which statistics", lambda v: human_bytes(sum(s.nbytes(micro_batch) for s in v.statistics))),
        *((f"multiply-adds, {role} graph", _graph_macs(role)) for role in roles),
        ("multiply-adds, codec", lambda v: human_macs(_codec_macs(manifest, v)) if _is_by_layer(v) else "-"),
        ("multiply-adds, all of a step", lambda v: human_macs(step_macs(manifest, v))),
        ("paper's multiply-adds, forward", lambda v: human_macs(sum(p.forward_macs for p in v.layers))),
        (
            "paper's multiply-adds, weight gradient",
            lambda v: human_macs(sum(p.weight_gradient_macs for p in v.layers)),
        ),
    ]
    labels = [f"per batch of {manifest.batch_size}", *(label for label, _ in rows)]
    return [labels, *([v.method.upper(), *(cell(v) for _, cell in rows)] for v in variants)]


def _count_tables(manifest: Manifest) -> list[str]:
    """One table for each cost: a row for each number of layers, a column for each method."""
    micro_batch = min(MICRO_BATCH, manifest.batch_size)
    costs: list[tuple[str, Callable[[Variant], str]]] = [
        (f"activation bytes, batch {manifest.batch_size}", lambda v: human_bytes(v.activation_bytes)),
        (
            f"saved bytes, micro-batch {micro_batch}",
            lambda v: human_bytes(v.saved_bytes(micro_batch, manifest.batch_size)),
        ),
        ("multiply-adds of a step", lambda v: human_macs(step_macs(manifest, v))),
    ]
    counts, lines = manifest.layer_counts, list[str]()
    variants = {(variant.method, len(variant.layers)): variant for variant in manifest.variants}
    for label, cell in costs:
        columns = [["layers", *map(str, counts)]]
        for method in manifest.methods:
            found = (variants.get((method, number)) for number in counts)
            columns.append([method.upper(), *("-" if variant is None else cell(variant) for variant in found)])
        lines += ["", f"{label}:", *grid(columns)]
    return lines[1:]


def _file_columns(members: Sequence[Member]) -> list[list[str]]:
    """Every file; where they are too many to read, the graphs and the constants are one line each."""
    rows = [(member.name, member.size) for member in members]
    if len(rows) > MOST_FILES:
        folders: dict[str, list[int]] = {}
        for name, size in rows:
            folders.setdefault(name.partition("/")[0], []).append(size)
        rows = [
            (name if len(sizes) == 1 else f"{name}/, {count(len(sizes), 'file')}", sum(sizes))
            for name, sizes in folders.items()
        ]
    names, sizes = [name for name, _ in rows], [size for _, size in rows]
    return [["file", *names, "total"], ["size", *map(human_bytes, sizes), human_bytes(sum(sizes))]]


def _graph_macs(role: str) -> Callable[[Variant], str]:
    return lambda variant: human_macs(variant.graph_macs[role]) if role in variant.graph_macs else "-"


def step_macs(manifest: Manifest, variant: Variant) -> int:
    """Multiply-adds of a training step: every graph but the one that only predicts, and the codec."""
    graphs = sum(macs for role, macs in variant.graph_macs.items() if role != "predict")
    return graphs + _codec_macs(manifest, variant)


def _is_by_layer(variant: Variant) -> bool:
    """Whether the device compresses activations outside of all graphs."""
    return variant.schedule == "by layer"


def _codec_macs(manifest: Manifest, variant: Variant) -> int:
    """What compressing adds to the layers' own forward, where no graph does it."""
    layers = {layer.name: layer for layer in manifest.layers}
    own = (p.forward_macs - bp_forward_macs(layers[p.layer], manifest.batch_size) for p in variant.layers)
    return sum(own) if _is_by_layer(variant) else 0


def _preprocessing(steps: InputSpec) -> str:
    if isinstance(steps, ArrayInput):
        return f"none: float32 arrays {'x'.join(map(str, steps.shape))}"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (steps.mean, steps.std))
    resize = f"short side {steps.resize} px ({steps.interpolation})"
    return f"{resize}, centre crop {steps.resolution} px, mean {mean}, std {std}"


def _trainable(manifest: Manifest) -> str:
    values = sum(math.prod(int(dim) for dim in tensor.shape) for tensor in manifest.parameters)
    layers = count(len(manifest.layers), "layer")
    if len(manifest.layer_counts) > 1:
        layers = f"{_counts_text(manifest.layer_counts)} layers"
    weights = {layer.weight for layer in manifest.layers}
    others = [tensor.name for tensor in manifest.parameters if tensor.name not in weights]
    also = f" and {', '.join(others)}" if others else ""
    return f"{layers}{also}: {count(len(manifest.parameters), 'tensor')}, {values:,} values"


def _task_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What was learned before, what is protected and what is frozen; nothing of a single task."""
    if not manifest.tasks:
        return [("task", manifest.task)] if manifest.task else []
    earlier = ", ".join(f"{task.name} ({len(task.classes)} classes)" for task in manifest.tasks)
    facts = [("task", manifest.task), ("learned before", earlier)]
    protection = "none: earlier tasks will be forgotten"
    if manifest.protected:
        protection = f"{count(len(manifest.protected), 'layer')}: no weight decay, no biases"
    facts.append(("protected", protection))
    if manifest.frozen:
        facts.append(("frozen", "; ".join(f"{one.layer}: {one.reason}" for one in manifest.frozen)))
    return facts


def _counts_text(counts: Sequence[int]) -> str:
    """`1 to 10`, or `2, 4 or 8`."""
    if list(counts) == list(range(counts[0], counts[-1] + 1)):
        return f"{counts[0]} to {counts[-1]}"
    return f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}"
