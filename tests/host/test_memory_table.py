"""What `lance-host inspect memory.npz` says: how much is used, and how much longer it lasts."""

import numpy as np
import pytest

from lance_edge.memory import LayerMemory, LearnedTask, Memory, empty_memory
from lance_host.memory_table import memory_table, tasks_that_fit


def layer(dimension: int, *ranks: int) -> LayerMemory:
    bases = np.zeros((len(ranks), dimension, max(ranks)), np.float32)
    for group, rank in enumerate(ranks):
        bases[group, range(rank), range(rank)] = 1
    return LayerMemory(bases, ranks)


@pytest.fixture
def memory() -> Memory:
    layers = {"conv": layer(27, 13), "depthwise": layer(9, 4, 6), "fc": layer(40, 8), "old": layer(5, 5)}
    first = {"conv": (9,), "depthwise": (3, 5), "fc": (8,), "old": (5,)}
    second = {name: one.ranks for name, one in layers.items()}
    tasks = (
        LearnedTask("cats", 0.97, first, dict.fromkeys(first, 0.98)),
        LearnedTask("dogs", 0.973, second, {"conv": 0.975, "depthwise": 0.98, "fc": 0.999}),
    )
    return Memory("patch", "net", tasks, layers)


def row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line[len(name) :].split()


def test_a_row_for_each_layer(memory):
    text = memory_table(memory)
    # 27 - 13 = 14 dimensions, and the last task took 4 of them; 18 - 10 = 8 of both groups, and it took 2
    in_use = 4 * (27 * 13 + 9 * (4 + 6) + 40 * 8 + 5 * 5)  # without the padding of "depthwise"
    assert row(text, "bytes")[0] == f"{in_use / 1024:.2f}"
    assert row(text, "conv") == ["13", "/", "27", "48", "97", "3"]
    assert row(text, "depthwise") == ["2", "groups:", "4-6", "/", "9", "55", "98", "4"]
    assert row(text, "fc") == ["8", "/", "40", "20", "99", "no", "end"]
    assert row(text, "old") == ["5", "/", "5", "100", "frozen", "0"]
    assert row(text, "tasks") == ["cats", "(threshold", "0.97),", "dogs", "(threshold", "0.973)"]
    assert "No room for another task: 1 layer of 4, which stay frozen or would." in text


def test_the_first_layer_to_be_used_up_is_named(memory):
    layers = {name: one for name, one in memory.layers.items() if name != "old"}
    text = memory_table(Memory("patch", "net", memory.tasks, layers))
    assert "At the present rate there is room for 3 more tasks: then conv is used up." in text
    text = memory_table(Memory("patch", "net", memory.tasks, {"fc": layers["fc"]}))
    assert "At the present rate no layer is ever used up." in text


def test_a_layer_that_was_frozen_before_it_was_full_learns_no_more(memory):
    """The second task did not train it: 3 of 5 dimensions are protected, and nothing ever uses the rest."""
    layers = {"fc": memory.layers["fc"], "old": layer(5, 3)}
    frozen = Memory("patch", "net", memory.tasks, layers)
    assert tasks_that_fit(frozen, "old") == 0
    text = memory_table(frozen)
    assert row(text, "old") == ["3", "/", "5", "60", "frozen", "0"]
    assert "No room for another task: 1 layer of 2, which stay frozen or would." in text


def test_after_one_task_its_ranks_are_the_rate(memory):
    assert tasks_that_fit(Memory("patch", "net", memory.tasks[:1], {"conv": layer(27, 9)}), "conv") == 2


def test_an_empty_memory(memory):
    text = memory_table(empty_memory("channel", "net"))
    assert row(text, "tasks") == ["none"]
    assert "layer" not in text
