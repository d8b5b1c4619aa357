"""Train `mcunet` from random initialisation on CIFAR-10: the checkpoint that lance-host bundles.

    python scripts/pretrain_cifar10.py --data cifar10/ --work pretrain/ --output mcunet_cifar10.safetensors

`--data` is a folder `train/<class>/*` and `test/<class>/*` of 32x32 images, or an `.npz` with `x` uint8
`[N, 32, 32, 3]`, `y`, `x_test` and `y_test`.  Images grow with training (`--stages`): most steps run at
64 px, which is cheap, the last at the 160 px at which the network is used.  A checkpoint is written
after every epoch; the same command continues from it.  With `--export-only` the newest checkpoint is
exported as it is.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from lance_edge.files import atomic_writer
from lance_host.zoo import ZOO

CLASSES = 10
LOG_COLUMNS = "epoch,steps,resolution,learning_rate,train_loss,test_accuracy,seconds"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; a checkpoint of another recipe is refused."""

    stages: str = "64:12,96:2.5,160:0.4"  # resolution:epochs, in order
    batch_size: int = 128
    peak_lr: float = 0.15
    final_lr: float = 0.002
    warmup_fraction: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    label_smoothing: float = 0.05
    seed: int = 0

    def schedule(self, steps_per_epoch: int) -> list[int]:
        """The resolution of every step."""
        resolutions: list[int] = []
        for stage in self.stages.split(","):
            resolution, epochs = stage.split(":")
            resolutions += [int(resolution)] * round(float(epochs) * steps_per_epoch)
        return resolutions

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up, then a cosine to `final_lr`; `progress` runs from 0 to 1."""
        if progress < self.warmup_fraction:
            return self.peak_lr * (0.05 + 0.95 * progress / self.warmup_fraction)
        angle = math.pi * (progress - self.warmup_fraction) / (1 - self.warmup_fraction)
        return self.final_lr + (self.peak_lr - self.final_lr) * 0.5 * (1 + math.cos(angle))


@dataclass(frozen=True)
class Dataset:
    """Images uint8 `[N, 3, H, W]` and labels int64 `[N]` of both parts."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.recipe.seed)
    network = ZOO["mcunet"].build(CLASSES).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arguments.export_only:
        load_checkpoint(arguments.work / "last.pt", network, None, arguments.recipe)
        export(network, arguments.output, arguments.recipe)
        return
    data = load_data(arguments.data)
    train(network, data, arguments.recipe, arguments.work)
    for resolution in (64, 96, 128, 160):
        print(f"final test accuracy at {resolution} px: {accuracy(network, data, resolution):.4f}", flush=True)
    export(network, arguments.output, arguments.recipe)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="class-folder root or .npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--stages", default=Recipe.stages, help="resolution:epochs,...")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint and stop")
    arguments = parser.parse_args()
    arguments.recipe = Recipe(stages=arguments.stages, seed=arguments.seed)
    return arguments


def train(network: nn.Module, data: Dataset, recipe: Recipe, work: Path) -> None:
    """Train to the end of the schedule, continuing from `work/last.pt` where it exists."""
    steps_per_epoch = len(data.images) // recipe.batch_size
    resolutions = recipe.schedule(steps_per_epoch)
    initialise(network)
    optimizer = make_optimizer(network, recipe)
    step = load_checkpoint(work / "last.pt", network, optimizer, recipe)
    while step < len(resolutions):
        started, losses = time.monotonic(), []
        epoch = step // steps_per_epoch
        for batch in epoch_batches(len(data.images), recipe, epoch):
            if step == len(resolutions):
                break
            lr = recipe.learning_rate(step / len(resolutions))
            losses.append(train_step(network, optimizer, data, batch, resolutions[step], lr, recipe))
            step += 1
            if step % 50 == 0:
                print(f"step {step}/{len(resolutions)} loss {np.mean(losses[-50:]):.3f}", flush=True)
        test = accuracy(network, data, resolutions[step - 1])
        seconds = time.monotonic() - started
        row = f"{epoch + 1},{step},{resolutions[step - 1]},{lr:.5f},{np.mean(losses):.4f},{test:.4f},{seconds:.0f}"
        save_checkpoint(work / "last.pt", network, optimizer, recipe, step)
        append_log(work / "log.csv", row)


def initialise(network: nn.Module) -> None:
    """He initialisation of the convolutions, by fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD; only matrices decay, batch normalisation and biases do not."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, recipe.peak_lr, momentum=recipe.momentum, nesterov=True)


def epoch_batches(samples: int, recipe: Recipe, epoch: int) -> Iterator[torch.Tensor]:
    """Full batches of shuffled indices; augmentation of the epoch follows from the same seed."""
    torch.manual_seed(recipe.seed * 1000 + epoch)
    order = torch.randperm(samples)
    for start in range(0, samples - recipe.batch_size + 1, recipe.batch_size):
        yield order[start : start + recipe.batch_size]


def train_step(
    network: nn.Module,
    optimizer: torch.optim.SGD,
    data: Dataset,
    batch: torch.Tensor,
    resolution: int,
    learning_rate: float,
    recipe: Recipe,
) -> float:
    """One step; the loss."""
    network.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    logits = network(augment(data.images[batch], resolution))
    loss = functional.cross_entropy(logits, data.labels[batch], label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()
    return float(loss.detach())


def augment(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """A random square of 70-105 % of the side, half of them flipped, brought to `resolution`.

    uint8 `[N, 3, H, H]` to float32 `[N, 3, R, R]`.  The side is drawn once for the batch (one resize for
    all), the position for every image; evaluation sees the central 87.5 %.
    """
    n, side = len(images), images.shape[-1]
    margin = side // 10
    view = int(torch.randint(round(0.7 * side), round(1.05 * side) + 1, ()))
    padded = functional.pad(images.float(), [margin] * 4, mode="reflect")
    offsets = torch.randint(0, side + 2 * margin - view + 1, (2, n, 1))
    rows, columns = offsets + torch.arange(view)  # [N, view] each
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    views = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # [N, view, view, 3]
    size = (resolution, resolution)
    return normalise(functional.interpolate(views.permute(0, 3, 1, 2), size=size, mode="bilinear"))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """0..255 to -1..1, the input range of the network."""
    return pixels.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(network: nn.Module, data: Dataset, resolution: int) -> float:
    """Share of correct test images with the preprocessing of the package (bilinear, centre crop)."""
    network.eval()
    side = int(resolution * 256 / 224)
    first = (side - resolution) // 2
    last, correct = first + resolution, 0
    for images, labels in zip(data.test_images.split(125), data.test_labels.split(125), strict=True):
        large = functional.interpolate(images.float(), size=(side, side), mode="bilinear")
        logits = network(normalise(large[:, :, first:last, first:last]))
        correct += int((logits.argmax(1) == labels).sum())
    return correct / len(data.test_labels)


def save_checkpoint(
    path: Path, network: nn.Module, optimizer: torch.optim.SGD, recipe: Recipe, step: int
) -> None:
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with atomic_writer(path) as file:
        torch.save(state | {"recipe": vars(recipe)}, file)


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.SGD | None, recipe: Recipe) -> int:
    """The number of steps done, 0 without a checkpoint."""
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["recipe"] != vars(recipe):
        raise SystemExit(f"{path}: made with {state['recipe']}, now {vars(recipe)}; use another --work")
    network.load_state_dict(state["network"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def append_log(path: Path, row: str) -> None:
    header = "" if path.exists() else LOG_COLUMNS + "\n"
    with path.open("a") as file:
        file.write(f"{header}{row}\n")
    print(f"{LOG_COLUMNS}\n{row}", flush=True)


def export(network: nn.Module, path: Path, recipe: Recipe) -> None:
    """Matrices as float16, batch normalisation and biases as float32; step counters left out."""
    tensors = {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with atomic_writer(path) as file:
        file.write(save(tensors, {"recipe": json.dumps(vars(recipe), sort_keys=True)}))
    print(f"{path}: {path.stat().st_size} bytes", flush=True)


def load_data(path: Path) -> Dataset:
    """Read everything into memory."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            parts = [arrays[name] for name in ("x", "y", "x_test", "y_test")]
    else:
        parts = [*read_folder(path / "train"), *read_folder(path / "test")]
    x, y, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return Dataset(x.permute(0, 3, 1, 2), y.long(), x_test.permute(0, 3, 1, 2), y_test.long())


def read_folder(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 `[N, H, W, 3]` and labels; classes in alphabetical order."""
    images, labels = [], []
    for label, folder in enumerate(sorted(entry for entry in root.iterdir() if entry.is_dir())):
        for file in sorted(folder.iterdir()):
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
            labels.append(label)
    return np.stack(images), np.array(labels)


if __name__ == "__main__":
    main()
