"""What can be said of the files of a command at once, before PyTorch is imported and a network is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lance_edge.checkpoints import open_archive
from lance_edge.datasets import open_dataset
from lance_edge.input_spec import DEFAULT_SPLIT
from lance_edge.matrices import open_matrices
from lance_edge.memory import SCHEMA_VERSION as MEMORY_SCHEMA
from lance_edge.statistics import SCHEMA_VERSION as STATISTICS_SCHEMA

SEALED = {"memory": MEMORY_SCHEMA, "statistics": STATISTICS_SCHEMA}


def check_files(options: Mapping[str, Any]) -> None:
    """See that checkpoint, memory, statistics and class folders are there, and are that.

    Raises:
        LanceError: naming the first that is not.
    """
    checkpoint: Path | None = options.get("checkpoint")
    if checkpoint is not None:
        with open_archive(checkpoint) as archive:
            archive.expect_checkpoint()
        for what, schema in SEALED.items():
            if (path := options.get(what)) is not None:
                with open_matrices(path, what, schema) as file:
                    file.meta()
    data: Path | None = options.get("data")
    if data is not None and not data.is_file():  # what is in a file is read once, later
        open_dataset(data, DEFAULT_SPLIT)
