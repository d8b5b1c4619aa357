"""Which of the project's `.npz` files a file is, by its meta data: they are easily taken for each other."""

from typing import Any

# What only the meta data of a kind have.
OWN_FIELDS = {"memory": "tasks", "statistics": "memory_sha256", "checkpoint": "run_id"}

OF_KIND = {
    "memory": "this is a memory of earlier tasks: --memory",
    "statistics": "this is a stats file of lance-device collect: --stats",
    "checkpoint": "this is a checkpoint of a run: --checkpoint",
}


def kind_of(meta: Any) -> str | None:
    """`memory`, `statistics`, `checkpoint`, or `None` for what is none of them."""
    if not isinstance(meta, dict):
        return None
    return next((kind for kind, field in OWN_FIELDS.items() if field in meta), None)
