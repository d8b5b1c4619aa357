"""`--keep-every`: copies of the state that later checkpoints do not replace."""

from device_harness import arrays, assert_same_arrays, started, train

WITHOUT_EVALUATIONS = ("--eval-every", 0, "--cache", "off")


def test_a_copy_after_every_so_many_epochs(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--epochs", 5, "--keep-every", 2, *WITHOUT_EVALUATIONS))
    assert sorted(path.name for path in out.glob("epoch-*.npz")) == ["epoch-0002.npz", "epoch-0004.npz"]
    second, fourth = arrays(out / "epoch-0002.npz"), arrays(out / "epoch-0004.npz")
    assert any((second[name] != fourth[name]).any() for name in second)


def test_the_copy_of_the_last_epoch_is_the_last_state(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--epochs", 2, "--keep-every", 1, *WITHOUT_EVALUATIONS))
    assert_same_arrays(out / "epoch-0002.npz", out / "last.npz")


def test_keeping_changes_no_weight(package, images, tmp_path):
    for name, words in (("kept", ("--keep-every", 1)), ("plain", ())):
        started(train(package, images, tmp_path / name, "--epochs", 2, *words, *WITHOUT_EVALUATIONS))
    assert_same_arrays(tmp_path / "kept" / "last.npz", tmp_path / "plain" / "last.npz")
    assert not list((tmp_path / "plain").glob("epoch-*.npz"))


def test_every_zero_epochs_is_refused(package, images, tmp_path):
    result = train(package, images, tmp_path / "run", "--keep-every", 0)
    assert result.exit_code == 2
    assert "0 is not in the range x>=1" in result.stderr
