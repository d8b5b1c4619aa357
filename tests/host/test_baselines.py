"""The baselines, each against its formula written down literally."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lance_edge.arrays import FloatPart
from lance_edge.errors import NumericalError
from lance_edge.stream import SampleStream
from lance_host.continual_benchmark.baselines import (
    AveragedGem,
    ElasticWeights,
    ExperienceReplay,
    Replay,
    fisher_diagonal,
    project_agem,
)
from lance_host.continual_benchmark.in_pytorch import trained as trained_parameters
from lance_host.continual_benchmark.job import read_carry, write_carry
from lance_host.continual_benchmark.multi_head import MultiHead, body_parameters, evaluate, set_training
from lance_host.continual_benchmark.protocol import Recipe
from lance_host.continual_benchmark.trainer import (
    AllTasks,
    Batch,
    CrossEntropy,
    OneTask,
    Plateau,
    epoch_batches,
    step,
)


class Tiny(nn.Module):
    """A convolution with a batch-norm, and features; in float64, where formulas agree to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 49, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.bn(self.conv(x)).relu().flatten(1))
        return logits


@pytest.fixture
def network() -> MultiHead:
    torch.manual_seed(0)
    return MultiHead(Tiny(), {name: nn.Linear(196, 2, bias=False) for name in ("one", "two")})


def part_of(count: int, seed: int = 0) -> FloatPart:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, 3, 32, 32), dtype=np.float32)
    names = tuple(f"x[{row}]" for row in range(count))
    return FloatPart(values, np.arange(count), names, rng.integers(0, 2, count))


def batch_of(count: int, task: str, seed: int = 0) -> Batch:
    part = part_of(count, seed)
    return Batch(torch.from_numpy(part.values), torch.from_numpy(part.labels), [task] * count)


def trained(network: MultiHead, task: str = "two") -> dict[str, nn.Parameter]:
    return body_parameters(network, with_norms=False) | {"head.weight": nn.Parameter(network.head(task).weight)}


def gradient(network: MultiHead, batch: Batch, name: str = "conv.weight") -> torch.Tensor:
    """Of the mean cross-entropy, by autograd on a copy, with nothing of ours."""
    own = copy.deepcopy(network)
    losses = [
        functional.cross_entropy(own.heads[own.tasks.index(task)](own.body(image[None])), label[None])
        for image, label, task in zip(batch.images, batch.labels, batch.tasks, strict=True)
    ]
    torch.stack(losses).mean().backward()
    result = own.body.get_parameter(name).grad
    assert result is not None
    return result


def frozen(network: MultiHead) -> MultiHead:
    """As after the first task: an image's features do not depend on the others, so literal loops are right."""
    set_training(network, "running", first_task=False, dropout=False)
    return network


CLOSE = {"rtol": 1e-4, "atol": 1e-7}  # float32 sums over some thousand products, in another order


# --- what all share ---


def test_every_image_is_judged_by_the_head_of_its_task(network: MultiHead) -> None:
    frozen(network)
    batch = batch_of(6, "one")
    tasks = ["two", "one", "one", "two", "one", "two"]
    found = network.losses(batch.images, batch.labels, tasks)
    expected = [
        functional.cross_entropy(network(image[None], task), label[None])
        for image, label, task in zip(batch.images, batch.labels, tasks, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


def test_after_the_first_task_norms_neither_train_nor_move(network: MultiHead) -> None:
    frozen(network)
    before = copy.deepcopy(network.state())
    parameters = body_parameters(network, with_norms=False)
    assert set(parameters) == {"conv.weight"}
    step(network, batch_of(8, "two"), parameters, CrossEntropy(), 0.1)
    after = network.state()
    moved = {name for name in after.body if not torch.equal(after.body[name], before.body[name])}
    assert moved == {"conv.weight"}
    assert set(body_parameters(network, with_norms=True)) == {"conv.weight", "bn.weight", "bn.bias"}


def test_in_the_first_task_the_statistics_move(network: MultiHead) -> None:
    set_training(network, "running", first_task=True, dropout=False)
    before = network.body.get_buffer("bn.running_mean").clone()
    step(network, batch_of(8, "two"), body_parameters(network, with_norms=True), CrossEntropy(), 0.1)
    assert not torch.equal(before, network.body.get_buffer("bn.running_mean"))


def test_evaluation_with_batch_statistics_normalises_by_the_batch_and_changes_nothing(
    network: MultiHead,
) -> None:
    part = part_of(10)
    state = copy.deepcopy(network.state())
    loss, accuracy = evaluate(network, "one", part, "batch")
    images, labels = torch.from_numpy(part.values), torch.from_numpy(part.labels)
    maps = functional.conv2d(images, state.body["conv.weight"], stride=4)
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), unbiased=False, keepdim=True)
    features = ((maps - mean) / (var + 1e-5).sqrt()).relu().flatten(1)  # scale 1, shift 0
    logits = features @ state.heads["one"].T
    assert loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-4)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    for name, tensor in network.state().body.items():
        torch.testing.assert_close(tensor, state.body[name], rtol=0, atol=0)


def test_a_step_is_plain_descent(network: MultiHead) -> None:
    frozen(network)
    batch, before = batch_of(8, "two"), network.body.get_parameter("conv.weight").detach().clone()
    expected = before - 0.1 * gradient(network, batch)
    step(network, batch, trained(network), CrossEntropy(), 0.1)
    torch.testing.assert_close(network.body.get_parameter("conv.weight").detach(), expected, **CLOSE)


def test_a_loss_that_is_no_number_stops(network: MultiHead) -> None:
    frozen(network)
    batch = batch_of(2, "two")
    batch.images[0] = torch.nan
    with pytest.raises(
        NumericalError, match=r"task two: the loss is nan; a learning rate of 0\.5 is too large"
    ):
        step(network, batch, trained(network), CrossEntropy(), 0.5)


def test_the_rate_falls_as_published() -> None:
    """Against the loop of GPM's published training, written down again."""
    losses = list(np.random.default_rng(0).random(120))
    recipe = Recipe(lr=0.1, epochs=120, patience=3, least_lr=1e-3)
    plateau, rates = Plateau(recipe), []
    for loss in losses:
        rates.append(plateau.rate)
        plateau.improves(loss)
        if plateau.has_ended:
            break
    lr, best, left, expected = 0.1, np.inf, 3, []
    for loss in losses:
        expected.append(lr)
        if loss < best:
            best, left = loss, 3
        else:
            left -= 1
            if left <= 0:
                lr /= 2
                if lr < 1e-3:
                    break
                left = 3
    assert rates == expected
    assert len(rates) < 120


def test_batches_are_full_and_every_image_comes_once_an_epoch() -> None:
    epochs = epoch_batches(10, 4, seed=0)
    rows = np.concatenate([np.concatenate(next(epochs)) for _ in range(4)])
    assert len(rows) == 40
    for start in range(0, 40, 10):
        assert sorted(rows[start : start + 10]) == list(range(10))


def test_the_order_is_that_of_a_board_with_the_same_seed() -> None:
    """Epoch for epoch, against the documented rule: raw bits of PCG64, sorted."""
    rows = [np.argsort(np.random.PCG64([7, epoch, 0]).random_raw(10), kind="stable") for epoch in range(5)]
    expected = np.concatenate(rows)
    epochs = epoch_batches(10, 4, seed=7)
    found = [next(epochs) for _ in range(4)]
    assert [len(batches) for batches in found] == [3, 2, 3, 2]  # an epoch ends with the batch of its last image
    np.testing.assert_array_equal(np.concatenate([np.concatenate(batches) for batches in found]), expected[:40])
    board = SampleStream(10, 4, seed=7, shuffle=True, flip=False)
    for step_number, batch in enumerate(batch for batches in found for batch in batches):
        np.testing.assert_array_equal(batch, board.indices(step_number))


def test_joint_training_mixes_all_tasks() -> None:
    class Data:
        def __init__(self, count: int, seed: int) -> None:
            self.train = part_of(count, seed)

    both = AllTasks([OneTask("one", Data(5, 1)), OneTask("two", Data(7, 2))])  # type: ignore[arg-type]
    assert both.count == 12
    batch = both.batch(np.array([11, 0, 4, 5]))
    assert batch.tasks == ["one", "one", "two", "two"]
    expected = [
        part_of(5, 1).values[0],
        part_of(5, 1).values[4],
        part_of(7, 2).values[6],
        part_of(7, 2).values[0],
    ]
    np.testing.assert_array_equal(batch.images.numpy(), np.stack(expected))


# --- replay ---


def test_the_reservoir_keeps_every_image_equally_likely() -> None:
    """200 draws of 10 out of 40: each is kept 50 times on average, sd 6.1; five of them are 31."""
    counts = np.zeros(40)
    for seed in range(200):
        replay = Replay(10, seed)
        for number, task in enumerate("ab"):
            part = part_of(20)
            part.values[:, 0, 0, 0] = np.arange(20) + 20 * number
            replay.add(task, part)
        assert len(replay) == 10
        kept = replay.draw(10)
        numbers = kept.images[:, 0, 0, 0].numpy().astype(int)
        assert kept.tasks == ["ab"[number // 20] for number in numbers]
        counts[numbers] += 1
    assert np.abs(counts - 50).max() < 31


def test_a_reservoir_that_is_not_full_keeps_everything() -> None:
    replay = Replay(50, 0)
    replay.add("one", part_of(20))
    assert len(replay) == 20
    assert len(replay.draw(64).labels) == 20


def test_replay_descends_the_mean_over_batch_and_kept_images(network: MultiHead) -> None:
    frozen(network)
    method, batch = ExperienceReplay(16, 0), batch_of(8, "two", 5)
    method.finish(network, "one", part_of(16, 1), trained(network))
    twin = ExperienceReplay(16, 0)
    twin.recall(method.kept())
    kept = twin.replay.draw(8)
    parameters = trained(network)
    method.gradients(network, batch, parameters, 0.0)
    joined = Batch(
        torch.cat([batch.images, kept.images]),
        torch.cat([batch.labels, kept.labels]),
        [*batch.tasks, *kept.tasks],
    )
    torch.testing.assert_close(parameters["conv.weight"].grad, gradient(network, joined), **CLOSE)


def test_replay_trains_the_heads_that_its_images_have(network: MultiHead) -> None:
    frozen(network)
    for method in (ExperienceReplay(16, 0), AveragedGem(16, 0)):
        method.finish(network, "one", part_of(16, 1), trained(network))
        parameters = trained_parameters(network, network.tasks, with_norms=False)
        assert method.replays
        before = network.state().heads
        step(network, batch_of(8, "two", 5), parameters, method, 0.1)
        assert not torch.equal(before["two"], network.state().heads["two"])
        if isinstance(method, ExperienceReplay):  # A-GEM's is against a conflict alone
            assert not torch.equal(before["one"], network.state().heads["one"])


# --- A-GEM ---


def test_agem_projects_a_conflicting_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    g = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    r = [-g[0] + 0.3 * torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator) - g[1]]
    found = torch.cat([x.flatten() for x in project_agem(g, r)])
    flat, against = (torch.cat([x.flatten() for x in one]) for one in (g, r))
    assert flat @ against < 0
    torch.testing.assert_close(found, flat - (flat @ against) / (against @ against) * against)
    assert abs(float(found @ against)) < 1e-4  # of vectors of norm 4: orthogonal to float32 rounding


def test_agem_leaves_an_agreeing_gradient_alone() -> None:
    g = [torch.tensor([1.0, 2.0])]
    assert project_agem(g, [torch.tensor([0.5, 0.0])])[0] is g[0]
    assert project_agem(g, [torch.zeros(2)])[0] is g[0]


def test_agem_takes_its_reference_from_the_kept_images(network: MultiHead) -> None:
    frozen(network)
    method, batch = AveragedGem(16, 0), batch_of(8, "two", 5)
    part = part_of(8, 5)  # the same images with the other labels: certainly a conflict
    part.labels[:] = 1 - part.labels
    method.finish(network, "two", part, trained(network))
    twin = AveragedGem(16, 0)
    twin.recall(method.kept())
    kept = twin.replay.draw(8)
    g, r = gradient(network, batch), gradient(network, kept)
    parameters = body_parameters(network, with_norms=False)
    method.gradients(network, batch, parameters, 0.0)
    assert (g * r).sum() < 0
    torch.testing.assert_close(parameters["conv.weight"].grad, g - (g * r).sum() / (r * r).sum() * r, **CLOSE)


# --- EWC ---


def test_fisher_is_the_mean_of_squared_gradients(network: MultiHead) -> None:
    part = part_of(7)
    found = fisher_diagonal(network, "one", part, body_parameters(network, with_norms=False), 7, 0)
    network.eval()
    rows = zip(torch.from_numpy(part.values), torch.from_numpy(part.labels), strict=True)
    each = [gradient(network, Batch(image[None], label[None], ["one"])) ** 2 for image, label in rows]
    torch.testing.assert_close(found["conv.weight"], torch.stack(each).mean(0), rtol=1e-4, atol=1e-9)


def test_the_penalty_is_one_spring_for_each_task(network: MultiHead) -> None:
    frozen(network)
    method, parameters = ElasticWeights(penalty=300.0, samples=5, seed=0), trained(network)
    weight = parameters["conv.weight"]
    springs = []
    for number in range(2):
        springs.append(
            (
                fisher_diagonal(network, "one", part_of(5, number), {"w": weight}, 5, 0)["w"],
                weight.detach().clone(),
            )
        )
        method.finish(network, "one", part_of(5, number), {"conv.weight": weight})
        with torch.no_grad():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    frozen(network)
    for parameter in network.parameters():
        parameter.grad = None
    batch = batch_of(8, "two")
    plain = gradient(network, batch)
    method.gradients(network, batch, parameters, 0.0)
    penalty = sum(150.0 * (fisher * (weight - old) ** 2).sum() for fisher, old in springs)
    assert isinstance(penalty, torch.Tensor)
    (pull,) = torch.autograd.grad(penalty, weight)
    assert pull.abs().max() > 1e-4
    # w sum F - sum F w_k cancels where w is near w_k: to float32 rounding of its terms.
    torch.testing.assert_close(weight.grad, plain + pull, rtol=1e-3, atol=1e-5)

    # A large step: the penalty's gradient is that at its end, w', so w' = w - h (plain + dP/dw(w')).
    rate = 10.0
    for parameter in network.parameters():
        parameter.grad = None
    method.gradients(network, batch, parameters, rate)
    assert weight.grad is not None
    end = (weight - rate * weight.grad).detach().requires_grad_()
    there = sum(150.0 * (fisher * (end - old) ** 2).sum() for fisher, old in springs)
    assert isinstance(there, torch.Tensor)
    (pull,) = torch.autograd.grad(there, end)
    torch.testing.assert_close(weight.grad, plain + pull, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: ExperienceReplay(6, 0), lambda: ElasticWeights(10.0, 3, 0)])
def test_what_is_kept_comes_back_from_disk(network: MultiHead, tmp_path: Path, make) -> None:
    method, parameters = make(), body_parameters(network, with_norms=False)
    method.finish(network, "one", part_of(9), parameters)
    assert write_carry(tmp_path, method.kept()) == sum(array.nbytes for array in method.kept().values())
    other = make()
    other.recall(read_carry(tmp_path))
    results = []
    for one in (method, other):
        frozen(network)
        for parameter in network.parameters():
            parameter.grad = None
        one.gradients(network, batch_of(4, "two"), parameters, 0.1)
        results.append(parameters["conv.weight"].grad)
    torch.testing.assert_close(*results, rtol=0, atol=0)
