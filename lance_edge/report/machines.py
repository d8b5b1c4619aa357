"""Which machine measured: times of two are never divided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Two are the same where board, processor, cores and memory are; without a record none is the same."""

    key: tuple[Any, ...]
    label: str
    is_known: bool


def machine_of(record: Mapping[str, Any] | None, name: str) -> Machine:
    """Of a run's record; `name` stands for the machine of a run without one."""
    facts = None if record is None else record.get("machine")
    if not isinstance(facts, Mapping):
        return Machine(("unknown", name), f"unknown machine of {name} (no run.json)", False)
    ram = facts.get("ram_bytes")
    ram_gib = round(ram / GIB, 1) if isinstance(ram, int | float) else None
    key = tuple(str(facts.get(part)) for part in ("board", "cpu", "architecture", "cores"))
    title = facts.get("board") or facts.get("cpu") or "unnamed processor"
    cores = f", {facts['cores']} cores" if facts.get("cores") else ""
    memory = f", {ram_gib:g} GiB" if ram_gib else ""
    architecture = f", {facts['architecture']}" if facts.get("architecture") else ""
    return Machine((*key, ram_gib), f"{title}{cores}{memory}{architecture}", True)
