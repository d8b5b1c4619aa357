"""`--keep-every`: copies of the state that later checkpoints do not replace."""

import numpy as np
from device_harness import refused, started, train

WITHOUT_EVALUATIONS = ("--eval-every", 0, "--cache", "off")


def weights(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in ("meta", "sha256")}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_copy_after_every_so_many_epochs(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--epochs", 5, "--keep-every", 2, *WITHOUT_EVALUATIONS))
    assert sorted(path.name for path in out.glob("epoch-*.npz")) == ["epoch-0002.npz", "epoch-0004.npz"]
    assert not same(weights(out / "epoch-0002.npz"), weights(out / "epoch-0004.npz"))


def test_the_copy_of_the_last_epoch_is_the_last_state(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--epochs", 2, "--keep-every", 1, *WITHOUT_EVALUATIONS))
    assert same(weights(out / "epoch-0002.npz"), weights(out / "last.npz"))


def test_keeping_changes_no_weight(package, images, tmp_path):
    for name, words in (("kept", ("--keep-every", 1)), ("plain", ())):
        started(train(package, images, tmp_path / name, "--epochs", 2, *words, *WITHOUT_EVALUATIONS))
    assert same(weights(tmp_path / "kept" / "last.npz"), weights(tmp_path / "plain" / "last.npz"))
    assert not list((tmp_path / "plain").glob("epoch-*.npz"))


def test_no_copy_every_zero_epochs(package, images, tmp_path):
    line = refused(2, train(package, images, tmp_path / "run", "--keep-every", 0))
    assert "0 is not in the range x>=1" in line
