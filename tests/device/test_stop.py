"""A stop: within a graph that runs long, with nothing begun after it, and nothing left behind."""

import json
import os
import signal
import threading

import numpy as np
import pytest
from device_harness import assert_same_arrays, spawn, started, train, train_words
from onnx import TensorProto, helper, numpy_helper

from lance_device.session import Graph, interrupt_graphs
from lance_device.stop import stop_on_signals
from lance_edge.errors import Interrupted


def _long_graph(nodes):
    """`nodes` products of matrices, one after the other: each of them takes about 50 ms."""
    matrix = numpy_helper.from_array(np.full((1500, 1500), 1e-4, np.float32), "m")
    products = [helper.make_node("MatMul", [f"x{i}", "m"], [f"x{i + 1}"]) for i in range(nodes)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1500, 1500]) for n in ("x0", f"x{nodes}")]
    graph = helper.make_graph(products, "long", values[:1], values[1:], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return Graph(model.SerializeToString(), "long.onnx", 1)


def test_a_signal_ends_a_graph_that_runs():
    """Python's own handler would wait for the graph's end, and the run would give its result."""
    graph, notes = _long_graph(400), []
    values = {"x0": np.ones((1500, 1500), np.float32)}
    with stop_on_signals(notes.append, interrupt_graphs) as stop:
        timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM])
        timer.start()
        with pytest.raises(Interrupted):
            graph.run(values)
        assert stop.requested
        assert len(notes) == 1
        with pytest.raises(Interrupted):  # nor does another begin
            _long_graph(1).run(values)
    assert _long_graph(1).run(values)["x1"].shape == (1500, 1500)  # after that all is as before


def test_a_terminal_that_closes_twice_is_one_request():
    """The shell and the kernel each send SIGHUP: the second must not end the run unsaved."""
    with stop_on_signals(lambda note: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_no_image_is_decoded_after_a_signal(package, images, tmp_path):
    prelude = """
import atexit, os, signal
from lance_edge import screening
load, after = screening.load_image, []
calls = []
def count(path):
    calls.append(path)
    if len(calls) == 60 + 20:  # amid the second step of 16 images, after each was looked at once
        os.kill(os.getpid(), signal.SIGTERM)
    return load(path)
screening.load_image = count
atexit.register(lambda: print("decoded", len(calls)))
"""
    flags = ("--cache", "off", "--augment", "none", "--steps", 20, "--eval-every", 0)
    process = spawn(*train_words(package, images, tmp_path / "run"), *flags, prelude=prelude)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output == "decoded 80\n"


def test_listening_leaves_nothing_behind():
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - names only
    threads = threading.active_count()
    for _ in range(20):
        with stop_on_signals(lambda note: None, lambda wanted: None):
            pass
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    assert threading.active_count() == threads
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Counts what a run begins after the signal, which comes amid a micro-batch.
COUNT = """
import atexit, os, signal
from lance_device.session import Graph
run, after = Graph.run, []
calls = []
def counted(self, values):
    calls.append(self._where)
    if len(calls) == 25:
        os.kill(os.getpid(), signal.{name})
    if len(calls) > 25:
        after.append(self._where)
    return run(self, values)
Graph.run = counted
atexit.register(lambda: print("after", len(after)))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_nothing_is_begun_after_a_signal(package, images, tmp_path, name):
    flags = ("--epochs", 6, "--cache", "off")
    started(train(package, images, tmp_path / "whole", *flags))
    out = tmp_path / "run"
    words = (*train_words(package, images, out), *flags)
    process = spawn(*words, prelude=COUNT.format(name=name))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output.splitlines()[-1] == "after 0"
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    started(train(package, images, out, "--resume"))
    assert_same_arrays(out / "last.npz", tmp_path / "whole" / "last.npz")
