"""Feed mutated bytes to the readers of files, guided by what code they reach: needs `pip install atheris`.

    python scripts/fuzz.py package    --package pkg.tar SEEDS [-max_total_time=600]
    python scripts/fuzz.py checkpoint --package pkg.tar SEEDS
    python scripts/fuzz.py graph                        SEEDS

SEEDS is a folder of good files, and gets those that reach something new.  Whatever is no `LanceError` is a
mistake: atheris stops there and keeps the file.  Options of libFuzzer are passed on.
`tests/device/test_hostile.py` goes further: it uses what is read.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lance_edge", "lance_device", "zipfile", "json"]):
    from lance_device.checkpoint import read_checkpoint
    from lance_device.graphs import load_projections, starting_parameters
    from lance_edge.bundle import Bundle
    from lance_edge.errors import LanceError
    from lance_edge.graph_check import check_graph


def read_package(path: Path) -> None:
    """Manifest, digests and arrays; each graph as far as it is checked before a runtime sees it."""
    with Bundle(path) as bundle:
        for variant in bundle.manifest.variants:
            starting_parameters(bundle, variant)
            load_projections(bundle, variant)
            for members in variant.graphs.values():
                check_graph(bundle.read(*members), str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["package", "checkpoint", "graph"])
    parser.add_argument("--package", type=Path, help="that checkpoints belong to")
    options, rest = parser.parse_known_args()

    def read_state(path: Path) -> None:
        with Bundle(options.package) as bundle:
            read_checkpoint(path, bundle)

    def read_graph(path: Path) -> None:
        check_graph(path.read_bytes(), str(path))

    readers: dict[str, Callable[[Path], None]] = {
        "package": read_package,
        "checkpoint": read_state,
        "graph": read_graph,
    }
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case"

        def try_case(data: bytes) -> None:
            case.write_bytes(data)
            with suppress(LanceError):
                readers[options.kind](case)

        atheris.Setup([sys.argv[0], *rest], try_case)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
