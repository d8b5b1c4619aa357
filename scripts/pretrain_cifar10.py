"""Pretrain MCUNet on CIFAR-10 from random weights: makes the checkpoint that lance-host bundles.

    python scripts/pretrain_cifar10.py --data cifar10/ --work pretrain/ --output mcunet_cifar10.safetensors

`--data` holds `train/<class>/*` and `test/<class>/*`, 32x32 images, or is an `.npz` with `x` uint8
`[N, 32, 32, 3]`, `y`, `x_test` and `y_test`.  Two stages: epochs at 64 pixels, which are cheap, then
`--finish-steps` at 160 pixels, at which lance-host uses the network (without them it knows nothing there).
The state is written to `--work` after every epoch, and the same command resumes from it.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch.nn import functional as F  # noqa: N812 - its usual name

from lance_edge.files import atomic_writer
from lance_host.zoo import ZOO

RESOLUTION = 64
BATCH_SIZE = 128
FINISH_BATCH_SIZE = 64  # 160-pixel activations of 128 images leave the processor's cache
WARM_UP = 0.2  # share of the steps
PAD = 4  # pixels of the 32 x 32 image, for random crops
PREPROCESSING = ZOO["mcunet"].preprocessing

Part = tuple[torch.Tensor, torch.Tensor]  # images uint8 [N, 3, 32, 32], labels int64 [N]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    training, test = load_data(arguments.data)
    network = ZOO["mcunet"].build(10)
    pretrain(network, training, test, arguments)
    if arguments.finish_steps:
        finish(network, training, arguments)
    print(f"test accuracy {accuracy(network, test, finished=False):.4f} at {RESOLUTION} pixels", flush=True)
    print(f"test accuracy {accuracy(network, test, finished=True):.4f} at {PREPROCESSING.resolution} pixels")
    export(network, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    parser.add_argument("--finish-steps", type=int, default=240)
    parser.add_argument("--finish-lr", type=float, default=0.03, help="first learning rate of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_data(path: Path) -> tuple[Part, Part]:
    """Training and test part."""
    if path.suffix != ".npz":
        return load_images(path / "train"), load_images(path / "test")
    with np.load(path) as arrays:
        x, y, x_test, y_test = (torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test"))
    return (x.permute(0, 3, 1, 2).contiguous(), y), (x_test.permute(0, 3, 1, 2).contiguous(), y_test)


def load_images(folder: Path) -> Part:
    """All images of a part as uint8 `[N, 3, 32, 32]`, and their labels `[N]`."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, parent in enumerate(classes) for path in sorted(parent.iterdir())]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        [label for _, label in files]
    )


def pretrain(network: torch.nn.Module, training: Part, test: Part, arguments: argparse.Namespace) -> None:
    """The first stage, from the state in `--work` where there is one."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), arguments.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    state_file, first = arguments.work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, arguments.epochs):
        started = time.monotonic()
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        loss = train_epoch(network, optimizer, training, generator, epoch, arguments)
        score, seconds = accuracy(network, test, finished=False), time.monotonic() - started
        print(f"epoch {epoch + 1} loss {loss:.4f} accuracy {score:.4f} {seconds:.0f} s", flush=True)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        with atomic_writer(state_file) as file:
            torch.save(state, file)
        export(network, arguments.output)


def train_epoch(
    network: torch.nn.Module,
    optimizer: torch.optim.SGD,
    training: Part,
    generator: torch.Generator,
    epoch: int,
    arguments: argparse.Namespace,
) -> float:
    """One epoch at 64 pixels; the mean loss."""
    images, labels = training
    order = torch.randperm(len(images), generator=generator)
    steps, total = len(images) // BATCH_SIZE, 0.0
    network.train()
    for step in range(steps):
        chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        inputs = to_input(augment(images[chosen], generator), RESOLUTION)
        rate = learning_rate(arguments.lr, (epoch * steps + step) / (arguments.epochs * steps))
        total += train_step(network, optimizer, inputs, labels[chosen], rate)
    return total / steps


def finish(network: torch.nn.Module, training: Part, arguments: argparse.Namespace) -> None:
    """The last stage: random crops of 160 of 182 pixels; a cosine from `--finish-lr` to zero."""
    images, labels = training
    generator = torch.Generator().manual_seed(arguments.seed * 1000 + arguments.epochs)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    room = PREPROCESSING.resize - PREPROCESSING.resolution
    order = torch.randperm(len(images), generator=generator)
    network.train()
    losses = []
    for step in range(arguments.finish_steps):
        chosen = order[torch.arange(step * FINISH_BATCH_SIZE, (step + 1) * FINISH_BATCH_SIZE) % len(order)]
        top, left = (int(torch.randint(0, room + 1, (), generator=generator)) for _ in range(2))
        inputs = crop(to_input(augment(images[chosen], generator), PREPROCESSING.resize), top, left)
        rate = arguments.finish_lr * 0.5 * (1 + math.cos(math.pi * step / arguments.finish_steps))
        losses.append(train_step(network, optimizer, inputs, labels[chosen], rate))
        if step % 20 == 19:
            print(f"finish step {step + 1} loss {np.mean(losses[-20:]):.4f}", flush=True)


def train_step(
    network: torch.nn.Module,
    optimizer: torch.optim.SGD,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    rate: float,
) -> float:
    """One step; the loss before it."""
    loss = F.cross_entropy(network(inputs), labels, label_smoothing=0.05)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def to_input(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """uint8 `[n, 3, 32, 32]` to the network's input, `[n, 3, R, R]` in [-1, 1]."""
    scaled = (images.float() / 255 - 0.5) / 0.5
    upsampled = F.interpolate(scaled, resolution, mode="bilinear", align_corners=False)
    return upsampled.contiguous(memory_format=torch.channels_last)


def crop(inputs: torch.Tensor, top: int, left: int) -> torch.Tensor:
    """`[n, 3, 182, 182]` to `[n, 3, 160, 160]`."""
    side = PREPROCESSING.resolution
    cropped = inputs[:, :, top : top + side, left : left + side]
    return cropped.contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop and a random flip of each image."""
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    offsets = torch.randint(0, 2 * PAD + 1, (len(images), 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(32)  # [n, 32]
    columns = offsets[:, 1:] + torch.arange(32)
    flip = torch.rand(len(images), 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    index = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first fifth, then a cosine to zero; `progress` runs from 0 to 1.

    It depends on nothing else, so a run can be resumed with fewer or more `--epochs`.
    """
    if progress < WARM_UP:
        return peak * (0.04 + 0.96 * progress / WARM_UP)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


@torch.no_grad()
def accuracy(network: torch.nn.Module, test: Part, finished: bool) -> float:
    """Share of correct images: whole at 64 pixels, or `finished`, the central 160 of 182 pixels."""
    network.eval()
    middle = (PREPROCESSING.resize - PREPROCESSING.resolution) // 2
    correct = 0
    for images, labels in zip(test[0].split(100), test[1].split(100), strict=True):
        if finished:
            inputs = crop(to_input(images, PREPROCESSING.resize), middle, middle)
        else:
            inputs = to_input(images, RESOLUTION)
        correct += int((network(inputs).argmax(1) == labels).sum())
    return correct / len(test[1])


def export(network: torch.nn.Module, path: Path) -> None:
    """Half precision, without the counters that only training needs."""
    state = {k: v.half().contiguous() for k, v in network.state_dict().items() if v.is_floating_point()}
    with atomic_writer(path) as file:
        file.write(save(state))


if __name__ == "__main__":
    main()
