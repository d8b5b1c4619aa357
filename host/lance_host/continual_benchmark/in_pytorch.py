"""Methods that train in PyTorch: the first task of all, joint training, and the baselines."""

from collections.abc import Callable, Sequence

from lance_edge.files import atomic_writer
from lance_host.continual_benchmark.baselines import AveragedGem, Baseline, ElasticWeights, ExperienceReplay
from lance_host.continual_benchmark.job import Job, Learnt, bp_activation_bytes, read_carry, write_carry
from lance_host.continual_benchmark.multi_head import (
    MultiHead,
    body_parameters,
    network_of,
    new_head,
    new_network,
)
from lance_host.continual_benchmark.protocol import Preset
from lance_host.continual_benchmark.records import STATE
from lance_host.continual_benchmark.state import NetworkState, read_state, write_state
from lance_host.continual_benchmark.trainer import (
    AllTasks,
    CrossEntropy,
    Objective,
    OneTask,
    Parameters,
    Training,
    train,
)

EPOCHS = "epochs"  # a file beside the state of the first task

BASELINES: dict[str, Callable[[Preset, int], Baseline]] = {
    "er": lambda preset, seed: ExperienceReplay(preset.replay, seed),
    "agem": lambda preset, seed: AveragedGem(preset.replay, seed),
    "ewc": lambda preset, seed: ElasticWeights(preset.ewc_penalty, preset.fisher_samples, seed),
}


def learn_first(job: Job) -> tuple[NetworkState, int]:
    """The network after the first task, by plain backpropagation of all layers and the batch-norms.

    Methods of one learning rate share it: with the same seed they would all compute the same.  Not in the
    engine: there a batch-norm has frozen statistics, and a network that starts from random weights has none.

    Returns:
        the state, and the number of epochs.
    """
    folder = job.first / f"seed-{job.seed}-lr-{job.preset.recipe_of(job.method).lr:g}"
    if (folder / STATE).exists():
        return read_state(folder / STATE), int((folder / EPOCHS).read_text())
    network = new_network(job.network, job.task_seed)
    network.add_head(job.task.name, new_head(job.network, len(job.task.classes), job.task_seed))
    parameters = trained(network, [job.task.name], with_norms=True)
    epochs = _train(job, network, parameters, CrossEntropy(), first_task=True)
    with atomic_writer(folder / EPOCHS) as file:
        file.write(str(epochs).encode())
    write_state(folder / STATE, network.state())
    return network.state(), epochs


def _train(
    job: Job, network: MultiHead, parameters: Parameters, objective: Objective, *, first_task: bool
) -> int:
    material = OneTask(job.task.name, job.task.open())
    return train(network, material, parameters, objective, _how(job, first_task=first_task))


def _how(job: Job, *, first_task: bool) -> Training:
    recipe = job.preset.recipe_of(job.method)
    return Training(recipe, job.batch_norm, job.task_seed, first_task, job.preset.dropout, job.progress)


def trained(network: MultiHead, tasks: Sequence[str], *, with_norms: bool) -> Parameters:
    """The body, with or without its batch-norms' scale and shift, and the heads of these tasks."""
    heads = {f"heads/{name}": network.head(name).get_parameter("weight") for name in tasks}
    return body_parameters(network, with_norms=with_norms) | heads


def learn_baseline(job: Job) -> Learnt:
    """ER, A-GEM and EWC: the first task as everybody, then by the baseline's own gradient.

    The task's own head trains, and with replay, as published, the heads of the tasks that images are kept of.
    """
    preset, batch_size = job.preset, job.preset.recipe.batch_size
    baseline = BASELINES[job.method](preset, job.seed)
    if job.number == 0:
        state, epochs = learn_first(job)
        network = network_of(job.network, state)
    else:
        assert job.before is not None
        network = network_of(job.network, job.state_before())
        network.add_head(job.task.name, new_head(job.network, len(job.task.classes), job.task_seed))
        baseline.recall(read_carry(job.before))
        heads = network.tasks if baseline.replays else [job.task.name]
        parameters = trained(network, heads, with_norms=False)
        epochs = _train(job, network, parameters, baseline, first_task=False)
    weights = body_parameters(network, with_norms=False)
    baseline.finish(network, job.task.name, job.task.open().train, weights)
    kept = write_carry(job.folder, baseline.kept())
    images = 2 * batch_size if job.method == "er" and job.number else batch_size  # batch and replay at once
    return Learnt(
        state=network.state(),
        epochs=epochs,
        activation_bytes=bp_activation_bytes(job.network, images),
        kept_bytes={"replay" if job.method != "ewc" else "fisher": kept},
    )


def learn_jointly(job: Job) -> Learnt:
    """All tasks at once from random weights: the bound that learning one after the other is held against.

    Batches hold images of all tasks.  With `--batch-norm batch` they are normalised together, and at test each
    task by itself, so that the bound is lower than it would be of batches of one task.

    Not in the engine: a package has the head of one task.
    """
    network = new_network(job.network, job.task_seed)
    for task in job.tasks:
        network.add_head(task.name, new_head(job.network, len(task.classes), job.task_seed + task.number))
    parameters = trained(network, network.tasks, with_norms=True)
    material = AllTasks([OneTask(task.name, task.open()) for task in job.tasks])
    epochs = train(network, material, parameters, CrossEntropy(), _how(job, first_task=True))
    return Learnt(network.state(), epochs, bp_activation_bytes(job.network, job.preset.recipe.batch_size))
