"""The networks of continual-learning benchmarks, against the same written down once more in plain modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lance_host.zoo import ZOO
from lance_host.zoo.continual import ContinualAlexNet, ReducedResNet18

# Weights of convolutions and linear layers, then scale and shift of the norms, then the head of 10 classes.
ALEXNET = (
    *(64 * 3 * 16, 128 * 64 * 9, 256 * 128 * 4, 2048 * 1024, 2048 * 2048),
    *(2 * (64 + 128 + 256 + 2048 + 2048), 2048 * 10),
)


def literal_alexnet() -> nn.Sequential:
    """GPM's AlexNet from its description: kernels 4, 3, 2, no biases, dropout .2/.2/.5/.5/.5, pooling by 2."""
    stages = []
    for channels, out, kernel, dropout in ((3, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5)):
        stages += [nn.Conv2d(channels, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        stages += [nn.Dropout(dropout), nn.MaxPool2d(2)]
    stages.append(nn.Flatten())
    for features in (1024, 2048):
        stages += [nn.Linear(features, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*stages, nn.Linear(2048, 10, bias=False))


def copied(source: nn.Module, target: nn.Module) -> None:
    """All weights and buffers, in module order."""
    tensors = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    for value, own in tensors:
        own.copy_(value)


def moved_off_their_defaults(network: nn.Module) -> None:
    """Batch-norms with a scale, a shift and statistics that are not 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def test_alexnet_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in ContinualAlexNet(10).parameters()) == sum(ALEXNET)


@pytest.mark.parametrize("training", [False, True])
def test_alexnet_computes_what_its_description_says(training: bool) -> None:
    """Also with dropout: the same seed draws the same masks, so these stand at the same places."""
    network, literal = ContinualAlexNet(10), literal_alexnet()
    moved_off_their_defaults(network)
    copied(network, literal)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for one in (network, literal):
        torch.manual_seed(3)
        outputs.append(one.train(training)(images))
    torch.testing.assert_close(*outputs)


def literal_resnet(state: dict[str, torch.Tensor], x: torch.Tensor, stride: int, pool: int) -> torch.Tensor:
    """The reduced ResNet18 as formulas over its state dict, in evaluation mode."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{name}.{part}"] for part in names))

    def conv(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = norm(conv(x, "conv1", stride), "bn1").relu()
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, step = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(conv(x, f"{name}.conv1", step), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
            if step == 2:
                x = norm(conv(x, f"{name}.downsample.0", 2), f"{name}.downsample.1")
            x = (x + y).relu()
    return functional.avg_pool2d(x, pool).flatten(1) @ state["head.weight"].T


@pytest.mark.parametrize(("side", "stride", "pool"), [(32, 1, 2), (84, 2, 3)])
def test_reduced_resnet_computes_what_its_description_says(side: int, stride: int, pool: int) -> None:
    network = ReducedResNet18(5, stride).eval()
    moved_off_their_defaults(network)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Summed in another order; 17 layers of float32 without a scale: relative to the largest logit.
        expected = literal_resnet(network.state_dict(), images, stride, pool)
        torch.testing.assert_close(
            network(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_reduced_resnet_has_the_published_widths() -> None:
    network = ReducedResNet18(10)
    assert [network.get_submodule(f"layer{n}.1.conv2").weight.shape[0] for n in (1, 2, 3, 4)] == [
        20,
        40,
        80,
        160,
    ]
    assert network.head.weight.shape == (10, 640)
    assert network.head.bias is None


@pytest.mark.parametrize("name", ["alexnet", "resnet18-reduced"])
def test_the_zoo_has_them_for_images_that_are_not_resized(name: str) -> None:
    steps = ZOO[name].preprocessing
    assert steps is not None
    assert (steps.resolution, steps.resize) == (32, 32)
    assert [round(255 * value, 1) for value in (*steps.mean, *steps.std)] == [125.3, 123, 113.9, 63, 62.1, 66.7]
