"""Finished runs side by side, from their `run.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lance_device.run_record import read_record
from lance_edge.errors import DataError
from lance_edge.profiles import STEP_PHASES
from lance_edge.units import percent, size

PHASES = (*STEP_PHASES, "step")


def comparison_table(runs: Sequence[Path]) -> str:
    """A column for each run: accuracy, bytes, peak RSS, median time per phase.

    Raises:
        DataError: if a folder holds no finished run.
    """
    records = [_read_record(run) for run in runs]
    facts = [_checked_facts(run, record) for run, record in zip(runs, records, strict=True)]
    columns = [["", *(name for name, _ in facts[0])]]
    columns += [[run.name, *(text for _, text in own)] for run, own in zip(runs, facts, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in zip(*columns, strict=True)
    ]
    machines = {json.dumps(record.get("machine"), sort_keys=True) for record in records}
    if len(machines) > 1:
        lines.append("warning: these runs are of different machines: do not compare their times")
    return "\n".join(lines)


def _checked_facts(run: Path, record: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        return _facts(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{run / 'run.json'}: not the record of a run ({error!r}); read it with the version of lance-edge"
            " that wrote it"
        ) from None


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    options, result = record["options"], record["result"]
    peak = result["peak_rss_kib"]
    facts = [
        ("method", options["method"]),
        ("trained layers", str(options["layers"])),
        ("steps", str(result["step"])),
        ("batch, micro-batch", f"{record['batch_size']}, {options['micro_batch']}"),
        ("test accuracy", percent(result["test_accuracy"])),
        ("activation bytes", size(result["activation_bytes"])),
        ("saved bytes", size(result["saved_bytes"])),
        ("peak RSS", size(None if peak is None else peak * 1024)),
    ]
    return facts + [(f"{phase}, median", _latency(result["median_ms"].get(phase))) for phase in PHASES]


def _latency(median_ms: float | None) -> str:
    """`12.3 ms`, or `-` for a run of nothing but warm-up."""
    return "-" if median_ms is None else f"{median_ms:.1f} ms"


def _read_record(run: Path) -> dict[str, Any]:
    file = run / "run.json"
    record = read_record(file)
    if not isinstance(record.get("result"), dict):
        raise DataError(f"{file}: this run has not finished; let it end, or go on with --resume")
    return record
