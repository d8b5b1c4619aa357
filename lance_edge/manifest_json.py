"""`manifest.json`: written, read, and checked for what the types leave open."""

import json
from collections.abc import Iterator
from typing import Any

from lance_edge.errors import ArtifactError
from lance_edge.input_spec import input_rules
from lance_edge.manifest import SCHEMA_VERSION, Manifest, batch_multiple
from lance_edge.names import is_task_name, projection_name
from lance_edge.records import RecordError, from_json, to_json

# What schema 1 did not have, as a package without earlier tasks has it.
NEW_IN_2: dict[str, Any] = {"task": "", "head": [], "tasks": [], "protected": [], "frozen": []}


def _from_schema_1(value: dict[str, Any]) -> dict[str, Any]:
    """The same package as schema 2 writes it, as far as it is well-formed."""

    def plans(variants: Any) -> Iterator[Any]:
        for variant in variants if isinstance(variants, list) else ():
            layers = variant.get("layers") if isinstance(variant, dict) else None
            if isinstance(variant, dict):
                variant.setdefault("takes_any_rank", False)
                variant.setdefault("prefix_sha256", None)
            yield from layers if isinstance(layers, list) else ()

    for plan in plans(value.get("variants")):
        if isinstance(plan, dict):
            plan.setdefault("factor_bytes", None)
    return {**NEW_IN_2, **value, "schema_version": SCHEMA_VERSION}


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
    if version == 1:
        value, version = _from_schema_1(value), SCHEMA_VERSION
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


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _schema_message(where: str, version: Any) -> str:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return (
            f"{where}: schema {version}, this runtime reads {SCHEMA_VERSION};"
            " install a newer lance-edge here, or rebuild the package with the version installed here"
        )
    return f"{where}: expected schema {SCHEMA_VERSION}, found {version!r}; rebuild the package with lance-host"


def _check_meaning(manifest: Manifest) -> None:
    """What the types leave open and every reader relies on."""
    parameters = {spec.name for spec in manifest.parameters}
    layers = {layer.name for layer in manifest.layers}
    rules = {
        "two or more classes": len(manifest.classes) >= 2,
        "a batch size of 1 or more": manifest.batch_size >= 1,
        **input_rules(manifest.preprocessing),
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
        **_task_rules(manifest),
        "graphs of one member or more": all(
            names for variant in manifest.variants for names in variant.graphs.values()
        ),
    }
    broken = [expected for expected, holds in rules.items() if not holds]
    if broken:
        raise RecordError(f"expected {', '.join(broken)}")


def _task_rules(manifest: Manifest) -> dict[str, bool]:
    layers = {layer.name for layer in manifest.layers}
    names = [manifest.task, *(task.name for task in manifest.tasks)]
    return {
        "tasks with different names of letters, digits, dots and dashes": len(names) == len(set(names))
        and all(is_task_name(name) for name in names[0 if manifest.tasks else 1 :]),
        "two or more classes of every task": all(len(task.classes) >= 2 for task in manifest.tasks),
        "a head of fixed shape of every task": all(
            {spec.name for spec in task.head} == set(manifest.head)
            and all(isinstance(dim, int) for spec in task.head for dim in spec.shape)
            for task in manifest.tasks
        ),
        "protected layers, or frozen ones, after an earlier task": bool(manifest.tasks)
        or not (manifest.protected or manifest.frozen),
        "no layer both trained and frozen": layers.isdisjoint(one.layer for one in manifest.frozen),
    }
