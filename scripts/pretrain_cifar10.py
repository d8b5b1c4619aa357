"""Pretrain MCUNet on CIFAR-10 from random weights: makes the checkpoint that lance-host bundles.

    python scripts/pretrain_cifar10.py --data cifar10/ --work pretrain/ --output mcunet_cifar10.safetensors

`--data` holds `train/<class>/*` and `test/<class>/*`, 32x32 images.  They are upsampled to 64 pixels inside
the loop.  The state is written to `--work` after every epoch, and the same command resumes from it.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812 - its usual name

from lance_host.zoo.mcunet import build_mcunet

RESOLUTION = 64
BATCH_SIZE = 128
WARM_UP = 0.2  # share of the steps
PAD = 4  # pixels of the 32 x 32 image, for random crops


def load_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a part as uint8 `[N, 3, 32, 32]`, and their labels `[N]`."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, parent in enumerate(classes) for path in sorted(parent.iterdir())]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, 3, 32, 32]` to the network's input, `[n, 3, 64, 64]` in [-1, 1]."""
    scaled = (images.float() / 255 - 0.5) / 0.5
    upsampled = F.interpolate(scaled, RESOLUTION, mode="bilinear", align_corners=False)
    return upsampled.contiguous(memory_format=torch.channels_last)


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
def accuracy(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    correct = 0
    for start in range(0, len(images), 500):
        logits = network(to_input(images[start : start + 500]))
        correct += int((logits.argmax(1) == labels[start : start + 500]).sum())
    return correct / len(images)


def export(network: torch.nn.Module, path: Path) -> None:
    """Half precision, without the counters that only training needs."""
    state = {k: v.half().contiguous() for k, v in network.state_dict().items() if v.is_floating_point()}
    save_file(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)

    train, train_labels = load_images(arguments.data / "train")
    test, test_labels = load_images(arguments.data / "test")
    network = build_mcunet("mcunet", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), arguments.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(train) // BATCH_SIZE
    state_file, first = arguments.work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]

    for epoch in range(first, arguments.epochs):
        started, total = time.monotonic(), 0.0
        generator = torch.Generator().manual_seed(arguments.seed * 1000 + epoch)
        order = torch.randperm(len(train), generator=generator)
        network.train()
        for step in range(steps):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            logits = network(to_input(augment(train[chosen], generator)))
            loss = F.cross_entropy(logits, train_labels[chosen], label_smoothing=0.05)
            progress = (epoch * steps + step) / (arguments.epochs * steps)
            optimizer.param_groups[0]["lr"] = learning_rate(arguments.lr, progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        score = accuracy(network, test, test_labels)
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1} loss {total / steps:.4f} accuracy {score:.4f} {seconds:.0f} s", flush=True)
        part = state_file.with_suffix(".part")
        torch.save(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
            },
            part,
        )
        part.replace(state_file)
        export(network, arguments.output)


if __name__ == "__main__":
    main()
