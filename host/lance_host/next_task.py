"""What the next task starts from, and what is refused: memory, images or statistics, the network.

Whatever is accepted here keeps the promise that earlier tasks were given: only layers train of which the
memory knows what all earlier tasks need, and nothing but their weights and a new head.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lance_edge.datasets import Dataset
from lance_edge.errors import ArtifactError, LanceError
from lance_edge.input_spec import ArrayInput
from lance_edge.manifest import Layer
from lance_edge.memory import Memory, memory_digest, read_memory
from lance_edge.moments import expect_fitting, mode_sizes, protected_mode, protected_shape
from lance_edge.statistics import Statistics, read_statistics
from lance_host.build import choose_batch, open_images
from lance_host.heads import FIND
from lance_host.inputs import InputRequest
from lance_host.network import Network, NetworkRequest, load_network
from lance_host.past import Past
from lance_host.request import PATCH_METHODS, After, Feedback, Request


@dataclass(frozen=True)
class Material:
    """What is known of the new task: its images, or their second moments alone."""

    classes: tuple[str, ...]
    batch_size: int
    dataset: Dataset | None
    statistics: Statistics | None


def check_next(request: Request, after: After) -> None:
    """Refuse options that would break the protection, or that only a first task has.

    Raises:
        LanceError: naming the option.
    """
    if request.weights is not None:
        raise LanceError("--weights: the next task goes on from --checkpoint; leave --weights out")
    if after.statistics is not None and request.data is not None:
        raise LanceError("--stats: stands for the images of --data; give one of them")
    if after.memory is None:
        return
    flags = {"--train-bias": request.train_bias, "--train-norm": request.train_norm}
    for flag in (flag for flag, is_set in flags.items() if is_set):
        raise LanceError(
            f"{flag}: biases and norms change what earlier tasks see, whatever the memory protects; leave it"
            " out"
        )
    others = [method for method in request.methods if method not in PATCH_METHODS]
    if others or request.budgets:
        what = f"--methods {','.join(others)}" if others else "--memory-budget"
        raise LanceError(
            f"{what}: not beside --memory; expected some of {', '.join(PATCH_METHODS)}, and --energy"
        )


# --- memory -------------------------------------------------------------------------------------------


def open_memory(request: Request, after: After, past: Past) -> Memory | None:
    """The memory, where there is to be one; it must know all of the past.

    Raises:
        LanceError: if it is of another mode, network or past.
    """
    if after.memory is None:
        return None
    memory = read_memory(after.memory)
    check_remembered(memory, str(after.memory), past)
    if memory.mode != request.mode:
        raise ArtifactError(
            f"{after.memory}: is of {memory.mode} mode, not {request.mode}; use --mode {memory.mode}, or make"
            f" the memory with --mode {request.mode} from the first task on"
        )
    expect_fitting(memory, past.layers, str(after.memory))
    return memory


def check_model(memory: Memory, where: str, past: Past) -> None:
    """Refuse the memory of another network; of a network in a file, the folder of the file does not count.

    Raises:
        LanceError: naming both.
    """
    names = [name.rpartition("/")[2] for name in (memory.model, past.manifest.model)]
    if names[0] != names[1]:
        raise ArtifactError(f"{where}: of the network {names[0]}, not {names[1]}; give the memory of this one")


def check_remembered(memory: Memory, where: str, past: Past) -> None:
    """Refuse a memory that does not know all of the past.

    Raises:
        LanceError: naming what it does not know.
    """
    learned, remembered = [task.name for task in past.tasks], [task.name for task in memory.tasks]
    if remembered != learned:
        raise ArtifactError(
            f"{where}: remembers {', '.join(remembered) or 'no task'}, and the network has learned"
            f" {', '.join(learned)}; extend the memory with lance-host memory after each task"
        )
    check_model(memory, where, past)
    if memory.tasks[-1].checkpoint_sha256 not in ("", past.checkpoint_sha256):
        raise ArtifactError(
            f"{where}: remembers {past.task} as another checkpoint left it; give that checkpoint, or make the"
            " memory again from this one"
        )
    unknown = [layer.name for layer in past.layers if layer.name not in memory.layers]
    if unknown:
        raise ArtifactError(
            f"{where}: has nothing of layer {unknown[0]}; make the memory again from this checkpoint"
        )


# --- images or statistics -----------------------------------------------------------------------------


def open_material(
    request: Request, after: After, past: Past, memory: Memory | None, feedback: Feedback
) -> Material:
    """The new task's images, or its statistics.

    Raises:
        LanceError: if the statistics are not of this network, mode and state.
    """
    if after.statistics is None:
        dataset = open_images(request, feedback)
        if request.batch_size is None and past.manifest.batch_size <= len(dataset.train):
            request = replace(request, batch_size=past.manifest.batch_size)
        return Material(dataset.classes, choose_batch(request, dataset, feedback), dataset, None)
    where, found = str(after.statistics), read_statistics(after.statistics)
    check_statistics(found, where, past)
    if found.mode != request.mode:
        raise ArtifactError(
            f"{where}: is of {found.mode} mode, not {request.mode}; collect the statistics with --mode"
            f" {request.mode}"
        )
    check_moments(found, where, past.layers)
    if request.batch_size not in (None, found.batch_size):
        raise LanceError(
            f"--batch-size {request.batch_size}: the statistics are of batches of {found.batch_size}; leave it"
            " out"
        )
    if memory is not None and found.memory_sha256 != memory_digest(memory):
        feedback.say(
            "warning: the statistics were collected without this memory, so batch and positions are compressed"
            " worse, or not at all: collect them with --memory"
        )
    feedback.say(
        f"statistics: {found.batches} batches of {found.batch_size} images, {len(found.classes)} classes"
    )
    return Material(found.classes, found.batch_size, None, found)


def check_statistics(found: Statistics, where: str, past: Past) -> None:
    """Refuse statistics of another network, or of the same one in another state.

    Raises:
        LanceError: saying of what they are.
    """
    own = {"package": past.artifact_sha256, "checkpoint": past.checkpoint_sha256}
    theirs = {"package": found.artifact_sha256, "checkpoint": found.checkpoint_sha256}
    for what, digest in own.items():
        if theirs[what] != digest:
            raise ArtifactError(
                f"{where}: collected with another {what} ({theirs[what][:12]}, not {digest[:12]}); collect the"
                " statistics with what is given here"
            )
    missing = [layer.name for layer in past.layers if layer.name not in found.layers]
    if missing:
        raise ArtifactError(f"{where}: has nothing of layer {missing[0]}; collect the statistics again")


def check_moments(found: Statistics, where: str, layers: Iterable[Layer]) -> None:
    """Refuse second moments that are not of these layers, which have the protected mode at least.

    `read_statistics` has seen that they are finite and symmetric.

    Raises:
        ArtifactError: naming the first array of another shape.
    """
    if min(found.batches, found.batch_size) < 1:
        raise ArtifactError(
            f"{where}: of {found.batches} batches of {found.batch_size} images, expected one or more of each;"
            " collect the statistics again"
        )
    for layer in layers:
        sizes, protected = mode_sizes(layer, found.mode, found.batch_size), protected_mode(layer)
        groups, dimension = protected_shape(layer, found.mode)
        expected: dict[int, tuple[int, ...]] = {mode: (size, size) for mode, size in enumerate(sizes)}
        expected[protected] = (groups, dimension, dimension)
        for mode in sorted({protected, *found.layers[layer.name]}):
            moment = found.layers[layer.name].get(mode)
            if moment is None or moment.shape != expected.get(mode):
                shape = "nothing" if moment is None else str(list(moment.shape))
                wanted = list(expected[mode]) if mode in expected else "no such mode"
                raise ArtifactError(
                    f"{where}: {layer.name}/C{mode}: expected {wanted}, found {shape}; collect the statistics"
                    " again with this package"
                )


# --- the network --------------------------------------------------------------------------------------


def open_network(request: Request, past: Past, material: Material, feedback: Feedback) -> Network:
    """The network as the finished run left it, with a new head.

    Raises:
        LanceError: if it is to train layers that the task before did not, or takes other input.
    """
    before = past.manifest.preprocessing
    shape = before.shape if isinstance(before, ArrayInput) else None
    if material.dataset is not None:
        shape = material.dataset.array_shape
    wanted = network_request(request, past)
    network = load_network(wanted, len(material.classes), feedback.say, feedback.download, shape)
    if network.preprocessing != before:
        raise LanceError(
            f"the earlier tasks' input: expected {before}, found {network.preprocessing}; give data of the same"
            " kind, and leave --input-size, --mean, --std and --interpolation out"
        )
    known = {layer.name for layer in past.layers}
    new = [name for name in network.selections[-1] if name not in known]
    if new:
        raise LanceError(
            f"--layers {request.layers}: {new[0]} was not trained by the task before, so nothing is known of"
            f" what earlier tasks need of it; choose among {', '.join(sorted(known)) or 'none: --layers 0'}"
        )
    return network


def network_request(request: Request, past: Past) -> NetworkRequest:
    """What the user asks for; what they leave open is as it was."""
    asked, before = request.network, past.manifest.preprocessing
    model = asked.model or past.manifest.model
    head = past.head if asked.head == FIND else asked.head
    inputs = asked.input
    if not isinstance(before, ArrayInput):
        inputs = InputRequest(
            inputs.size or before.resolution,
            inputs.mean or before.mean,
            inputs.std or before.std,
            inputs.interpolation or before.interpolation,
        )
    return replace(asked, model=model, weights=past.weights, head=head, input=inputs)
