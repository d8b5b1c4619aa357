"""What the workstation prints about a memory: how much of each layer is protected, how much is left."""

from lance_edge.memory import LayerMemory, Memory
from lance_host.text import GAP, WIDTH, count, fact, grid, human_bytes, percent, shorten, width


def memory_table(memory: Memory) -> str:
    """The tasks, then a row per layer: dimensions, protected ones, and for how many more tasks they last."""
    facts = [
        ("model", memory.model),
        ("mode", memory.mode),
        ("tasks", ", ".join(f"{task.name} (threshold {task.threshold:g})" for task in memory.tasks) or "none"),
        ("bytes", human_bytes(memory.column_bytes)),
    ]
    lines = [line for pair in facts for line in fact(*pair)]
    if memory.layers:
        lines += ["", *grid(_columns(memory)), "", _closing(memory)]
    return "\n".join(lines)


def tasks_that_fit(memory: Memory, name: str) -> int | None:
    """How many more tasks a layer has room for at the rate of the tasks so far; `None`: without end.

    The rate is what the last task added.  A layer that the last task did not train is frozen for good.
    """
    if memory.tasks and name not in memory.tasks[-1].explained:
        return 0
    history = [sum(task.ranks[name]) for task in memory.tasks if name in task.ranks]
    layer = memory.layers[name]
    left = layer.groups * layer.dimension - sum(layer.ranks)
    if not left:
        return 0
    added = history[-1] - (history[-2] if len(history) > 1 else 0) if history else 0
    return left // added if added else None


def _columns(memory: Memory) -> list[list[str]]:
    layers = memory.layers
    last = memory.tasks[-1] if memory.tasks else None
    shares = {} if last is None else last.explained
    columns = [
        ["rank / dimension", *(_ranks(layer) for layer in layers.values())],
        ["used %", *(percent(layer.used) for layer in layers.values())],
        ["last task %", *(percent(shares[name]) if name in shares else "frozen" for name in layers)],
        ["more tasks", *(_fitting(tasks_that_fit(memory, name)) for name in layers)],
    ]
    room = WIDTH - sum(width(column) + len(GAP) for column in columns)
    return [["layer", *(shorten(name, room) for name in layers)], *columns]


def _ranks(layer: LayerMemory) -> str:
    """`37 / 576`, or of groups `480 groups: 3-9 / 25`."""
    if layer.groups == 1:
        return f"{layer.ranks[0]} / {layer.dimension}"
    low, high = min(layer.ranks), max(layer.ranks)
    span = str(low) if low == high else f"{low}-{high}"
    return f"{count(layer.groups, 'group')}: {span} / {layer.dimension}"


def _fitting(tasks: int | None) -> str:
    return "no end" if tasks is None else str(tasks)


def _closing(memory: Memory) -> str:
    """The layer that is used up first."""
    fitting = {name: tasks_that_fit(memory, name) for name in memory.layers}
    bounded = {name: tasks for name, tasks in fitting.items() if tasks is not None}
    if not bounded:
        return "At the present rate no layer is ever used up."
    first = min(bounded, key=lambda name: bounded[name])
    if not bounded[first]:
        full = sum(not tasks for tasks in bounded.values())
        return (
            f"No room for another task: {count(full, 'layer')} of {len(fitting)}, which stay frozen or would."
        )
    return (
        f"At the present rate there is room for {count(bounded[first], 'more task')}: then {first} is used up."
    )
