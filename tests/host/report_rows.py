"""Folders as runs and benchmarks leave them, with figures that tests can foretell."""

import dataclasses
import json

from lance_edge.bench_rows import BenchRow
from lance_edge.profiles import HistoryRow, StepRow, cells, columns

PHASES = {"data": 1.0, "prefix": 4.0, "forward": 2.0, "backward": 3.0, "update": 0.5}
ACTIVATION_BYTES = {"lance": 4096, "bp": 409_600, "asi": 4096, "hosvd": 2048}
MACHINE = {
    "board": "Raspberry Pi 4 Model B Rev 1.5",
    "cpu": "Cortex-A72",
    "architecture": "aarch64",
    "cores": 4,
    "ram_bytes": 4 << 30,
    "system": "Linux",
    "kernel": "6.12",
}
RECORD = {
    "schema_version": 1,
    "run_id": "20260101T000000Z-abcdef",
    "started": "2026-01-01T00:00:00+00:00",
    "status": "finished",
    "message": "",
    "total_steps": 20,
    "arguments": ["train", "--artifact", "pkg.tar", "--out", "run"],
    "options": {"method": "lance", "epochs": 2, "steps": None, "lr": 0.05},
    "machine": MACHINE,
    "versions": {"onnxruntime": "1.31.1"},
    "artifact": {"path": "pkg.tar", "identity_sha256": "0" * 64},
    "data": {"path": "photos", "train_sha256": "1" * 64, "train": 160, "validation": 20, "test": 400},
    "peak_rss_source": "VmHWM, reset per phase",
}


def step_rows(method="lance", step=1, scale=1.0, **changes):
    """Rows of all phases of a step; latencies are those of `PHASES` times `scale`."""
    row = StepRow(
        run_id="a", method=method, model="tiny", layers=2, energy=0.7, batch_size=16, micro_batch=8, threads=1,
        epoch=1 + step // 11, step=step, warmup=step == 1, phase="step",
        latency_ms=scale * sum(PHASES.values()), rss_kib=98_304, peak_rss_kib=102_400 + step, loss=2.0 / step,
        temperature_c=50.0 + step, arm_mhz=1800.0, throttled="0x0", time_s=2.0 * step, samples=16, cached=False,
        activation_bytes=ACTIVATION_BYTES[method], saved_bytes=8192,
    )  # fmt: skip
    row = dataclasses.replace(row, **changes)
    parts = [
        dataclasses.replace(row, phase=phase, latency_ms=scale * latency) for phase, latency in PHASES.items()
    ]
    return [*parts, row]


def history_rows(accuracies, steps_each=10):
    """An evaluation for each accuracy."""
    return [
        HistoryRow(
            n, n * steps_each, 0.05, 1.0 / n, accuracy - 0.05, accuracy, 0.9, accuracy, 1.0, True, 20.0 * n
        )
        for n, accuracy in enumerate(accuracies, start=1)
    ]


def write_rows(path, kind, rows, mode="w"):
    lines = [*([columns(kind)] if mode == "w" else []), *map(cells, rows)]
    with path.open(mode) as file:
        file.writelines(",".join(line) + "\n" for line in lines)


def write_run(
    folder, method="lance", steps=20, accuracies=(0.5, 0.75), scales=(1.0, 1.02), record=RECORD, **changes
):
    """A run whose steps take turns in `scales`; `record=None`: as copied from a board without run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for step in range(1, steps + 1)
        for row in step_rows(method, step, scales[step % len(scales)], **changes)
    ]
    write_rows(folder / "steps.csv", StepRow, rows)
    write_rows(folder / "history.csv", HistoryRow, history_rows(accuracies))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def write_benchmark(
    folder, methods=("lance", "bp", "asi", "hosvd"), layers=(1, 2, 3), scales=(1.0, 1.02), record=RECORD
):
    """Each method takes as long as its place in `methods`, times the layers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in layers:
        for place, method in enumerate(methods, start=1):
            for step in range(1, 8):
                scale = place * count * scales[step % len(scales)]
                rows += [
                    BenchRow(**dataclasses.asdict(row), trial=1)
                    for row in step_rows(method, step, scale, layers=count, cached=step > 1)
                ]
    write_rows(folder / "steps.csv", BenchRow, rows)
    (folder / "run.json").write_text(json.dumps({**record, "kind": "benchmark"}))
    return folder


def on_machine(**changes):
    """A record of another machine."""
    return {**RECORD, "machine": {**MACHINE, **changes}}
