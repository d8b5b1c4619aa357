"""What a run says of itself in `run.json`, but for its result."""

from dataclasses import asdict
from typing import Any

from lance_device.run_record import describe_machine, describe_package, describe_software, now_utc, read_record
from lance_device.run_setup import Run, TrainRequest
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import DataError


def describe_run(
    request: TrainRequest, run: Run, bundle: Bundle, dataset: Dataset, peak_source: str
) -> dict[str, Any]:
    """What `run.json` says from the start; of a resumed run, with what it said before."""
    earlier = _earlier_record(run) if run.is_resumed else {}
    here = {"at": now_utc(), "step": run.progress.step, "recovered": list(run.notes)}
    return {
        "run_id": run.run_id,
        "started": earlier.get("started", now_utc()),
        "resumed": [*earlier.get("resumed", []), here] if run.is_resumed else [],
        "artifact": describe_package(bundle),
        "data": {
            "path": str(request.data),
            "train_sha256": run.data_sha256,
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "arguments": list(request.arguments),
        "options": asdict(run.options),
        "given": sorted(request.given),
        "checkpoint_every": asdict(request.checkpoint_every),
        "batch_size": run.stream.batch_size,
        "total_steps": run.total_steps,
        "pace": asdict(request.pace),
        "memory": None if run.memory is None else asdict(run.memory),
        "peak_rss_source": peak_source,
        "machine": describe_machine(),
        **describe_software(),
    }


def _earlier_record(run: Run) -> dict[str, Any]:
    """What the run said of itself before the break; a report and no state, so a damaged one is given up."""
    try:
        return read_record(run.folder.record)
    except DataError as error:
        run.notes.append(f"run.json begins anew ({error})")
        return {}
