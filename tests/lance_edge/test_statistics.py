"""`stats.npz`: read back as it was, and nothing that is no second moment is believed."""

import dataclasses
import io

import numpy as np
import pytest

from lance_edge.errors import ArtifactError
from lance_edge.sealed import write_sealed
from lance_edge.statistics import Statistics, read_statistics, write_statistics


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((2, 5, 9))
    groups, batch = factor @ factor.transpose(0, 2, 1), np.ones((4, 4))
    layers = {"conv": {0: batch, 1: groups}, "fc": {1: groups[:1], 0: batch}}
    return Statistics("cats", ("tabby", "tiger"), "patch", "a" * 64, "c" * 64, "", 4, 3, layers)


def test_they_are_read_back_in_float32(tmp_path, statistics):
    write_statistics(tmp_path / "stats.npz", statistics)
    found = read_statistics(tmp_path / "stats.npz")
    assert dataclasses.replace(found, layers={}) == dataclasses.replace(statistics, layers={})
    assert found.images == 12
    assert {name: list(matrices) for name, matrices in found.layers.items()} == {"conv": [0, 1], "fc": [1, 0]}
    for name, matrices in statistics.layers.items():
        for mode, matrix in matrices.items():
            np.testing.assert_array_equal(found.layers[name][mode], matrix.astype(np.float32))
    with np.load(tmp_path / "stats.npz") as file:  # second moments and nothing else
        assert set(file.files) == {"meta", "conv/C0", "conv/C1", "fc/C0", "fc/C1", "sha256"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv/C1": None}, "conv/C1: expected finite float32 of 2 or 3 dimensions, found nothing; make the"),
        (
            {"conv/C1": np.triu(np.ones((3, 3), np.float32))},
            "conv/C1: expected a symmetric second moment, found",
        ),
        (
            {"conv/C1": -np.eye(3, dtype=np.float32)},
            "conv/C1: expected a symmetric second moment, found something",
        ),
        (
            {"conv/C1": np.ones((3, 2), np.float32)},
            "expected a symmetric second moment, found something else; collect",
        ),
        ({"x": np.zeros((3, 2), np.float32)}, "found the unknown array x; make the statistics again"),
        (
            {"meta": np.array('{"schema_version": 2}')},
            "statistics schema 2, this version reads 1; install a newer",
        ),
    ],
)
def test_what_is_no_statistics_is_refused(tmp_path, statistics, changes, message):
    path = tmp_path / "stats.npz"
    write_statistics(path, statistics)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"} | changes
    buffer = io.BytesIO()
    write_sealed(buffer, {name: value for name, value in arrays.items() if value is not None})
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ArtifactError) as raised:
        read_statistics(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
