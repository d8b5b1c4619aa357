"""The tiny package's training in PyTorch, from nothing but its arrays: what the runtime is held against."""

import numpy as np
import torch
from tiny_package import PREPROCESSING, SPLIT, TinyPackage
from torch.nn import functional

from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch


def rebuilt(features: torch.Tensor, projections: list[torch.Tensor]) -> torch.Tensor:
    """`A x_0 U_0 U_0^T ... x_3 U_3 U_3^T`: the activation that a core stands for."""
    u0, u1, u2, u3 = (u @ u.T for u in projections)
    return torch.einsum("nchw,nm,cd,hi,wj->mdij", features, u0, u1, u2, u3)


def logits_of(features: torch.Tensor, weights: dict[str, torch.Tensor], stand_in: torch.Tensor) -> torch.Tensor:
    """Logits of the tail; the weight gradient of the conv is taken with `stand_in` for its input."""
    weight = weights["conv.weight"]
    learned = functional.conv2d(stand_in, weight)
    linear = functional.conv2d(features, weight.detach()) + learned - learned.detach()
    return functional.linear(functional.relu(linear).mean((2, 3)), weights["head.weight"], weights["head.bias"])


def features_of(package: TinyPackage, images: np.ndarray) -> torch.Tensor:
    stem = torch.from_numpy(package.weights["stem.weight"])
    return functional.relu(functional.conv2d(torch.from_numpy(images), stem, stride=2, padding=1))


def loss_of(package, weights, method, images, labels) -> torch.Tensor:
    features = features_of(package, images)
    projections = [torch.from_numpy(package.projections[f"conv/U{mode}"]) for mode in range(4)]
    stand_in = rebuilt(features, projections) if method == "lance" else features
    return functional.cross_entropy(logits_of(features, weights, stand_in), torch.from_numpy(labels))


def trainable(package: TinyPackage) -> dict[str, torch.Tensor]:
    names = ("conv.weight", "head.weight", "head.bias")
    return {name: torch.tensor(package.weights[name], requires_grad=True) for name in names}


def train_in_torch(package, images_root, method, steps, lr, momentum, weight_decay, clip, schedule):
    """Unshuffled, unflipped training; returns the weights and the loss of every step."""
    part = open_dataset(images_root, SPLIT).train
    weights = trainable(package)
    sgd = torch.optim.SGD(weights.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=steps, eta_min=0.01 * lr)
    losses = []
    for step in range(steps):
        indices = [(step * package.batch_size + i) % len(part) for i in range(package.batch_size)]
        images = load_batch(part, indices, PREPROCESSING)
        loss = loss_of(package, weights, method, images, part.labels[indices])
        sgd.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        sgd.step()
        if schedule == "cosine":
            rates.step()
        losses.append(loss.item())
    return {name: value.detach().numpy() for name, value in weights.items()}, losses
