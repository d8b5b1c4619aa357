"""What a board decides, and that it decides nothing that the user did."""

import json

import pytest
from device_harness import lance_device, refused, started, train, train_words

from lance_device import machine
from lance_device.board import advice_note, choose_board
from lance_device.machine import describe_self
from lance_edge.boards import load_board


@pytest.fixture
def pi4(tmp_path, monkeypatch):
    """This machine says that it is a Raspberry Pi 4, with eight cores to spare."""
    (tmp_path / "model").write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    monkeypatch.setattr(machine, "MODEL", tmp_path / "model")
    monkeypatch.setattr("lance_device.options.available_cores", lambda: 8)


def test_a_board_describes_itself_in_the_device_tree(pi4):
    assert describe_self() == "Raspberry Pi 4 Model B Rev 1.4"
    assert choose_board("auto").name == choose_board(None).name == "rpi4"
    assert choose_board("rpi5").name == "rpi5", "what the user says counts"


def test_or_at_the_end_of_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MODEL", tmp_path / "none")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert describe_self() is None
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: ARMv8\n\nRevision\t: c03111\nModel\t\t: Raspberry Pi 4 Model B Rev 1.1\n"
    )
    assert describe_self() == "Raspberry Pi 4 Model B Rev 1.1"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\n")
    assert describe_self() is None
    assert choose_board("auto").name == "generic"


def options_of(folder):
    return json.loads((folder / "run.json").read_text())["options"]


def test_training_takes_the_boards_advice_and_says_so(pi4, package, images, tmp_path):
    words = [word for word in train_words(package, images, tmp_path / "run") if word not in ("--threads", 1)]
    result = started(lance_device(*words, "--steps", 1))
    assert "board: rpi4 (Raspberry Pi 4 Model B): --threads 4, --micro-batch 8\n" in result.stderr
    assert (options_of(tmp_path / "run")["threads"], options_of(tmp_path / "run")["micro_batch"]) == (4, 8)


def test_what_the_user_says_is_not_the_boards_business(pi4, package, images, tmp_path):
    result = started(train(package, images, tmp_path / "run", "--steps", 1, "--micro-batch", 3))
    assert "board:" not in result.stderr
    assert (options_of(tmp_path / "run")["threads"], options_of(tmp_path / "run")["micro_batch"]) == (1, 3)
    result = started(train(package, images, tmp_path / "other", "--steps", 1, "--board", "rpi5"))
    assert "board: rpi5 (Raspberry Pi 5): --micro-batch 8\n" in result.stderr


def test_no_more_threads_than_cores_that_the_process_may_use(pi4, package, images, tmp_path, monkeypatch):
    monkeypatch.setattr("lance_device.options.available_cores", lambda: 2)
    words = [word for word in train_words(package, images, tmp_path / "run") if word not in ("--threads", 1)]
    started(lance_device(*words, "--steps", 1))
    assert options_of(tmp_path / "run")["threads"] == 2


def test_an_unknown_board_is_refused_before_anything_is_written(package, images, tmp_path):
    line = refused(train(package, images, tmp_path / "run", "--board", "rpi9"), 9)
    assert "--board rpi9: expected auto or one of generic, rpi3b-plus, rpi4, rpi5" in line
    assert not (tmp_path / "run").exists()


def test_the_note_names_what_was_decided():
    chosen = {"threads": 4, "micro_batch": 8}
    rpi5 = load_board("rpi5")
    assert advice_note(rpi5, {"threads": 2, "micro_batch": None}, chosen) == (
        "board: rpi5 (Raspberry Pi 5): --micro-batch 8"
    )
    assert advice_note(rpi5, {"threads": 2, "micro_batch": 3}, chosen) is None
