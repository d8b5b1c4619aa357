"""Names with a fixed meaning: in graphs and packages; and what host and board have in common about tasks."""

import re
from pathlib import Path

# The dimension of a tensor that counts the samples of a micro-batch; a multiple of it is written "4*N".
BATCH_DIM = "N"
CLASSES_DIM = "classes"  # in `predict`, which serves the heads of all tasks
INPUTS_ROLE = "inputs"  # the graph from boundary tensors and parameters to every layer's input, `<layer>/A`

IMAGES = "images"  # float32 [N, 3, R, R], or arrays [N, ...], input of the prefix
LABELS = "labels"  # int64 [N], input of forward (and of backward, where it reads them)
SCALE = "scale"  # float32 [], input of backward: 1 / batch size, or 1 / the sum of the samples' weights
# Of a sample of class c the target is `off`, plus `on[c]` at c: both float32 [classes], inputs of forward and
# backward.  Ones and zeros are plain cross-entropy; class weights and label smoothing are other numbers.
TARGET_ON, TARGET_OFF = "target/on", "target/off"
# Of each sample the seed of what is dropped, 0 to 2^31 - 2, or -1 for nothing: int64 [N], input of forward and
# backward of packages that drop (`--dropout`).
DROPOUT_SEEDS = "dropout_seeds"
LOSS = "loss"  # float32 [], output of forward: cross-entropy summed over the N samples
LOGITS = "logits"  # float32 [N, classes], output of forward and of predict

WEIGHTS_MEMBER = "weights.npz"
PROJECTIONS_MEMBER = "projections.npz"
SPECTRA_MEMBER = "spectra.npz"
MEMORY_MEMBER = "memory.npz"  # what earlier tasks need of the layers, where there are any; see `memory.py`

MEMORY_BATCHES = 11  # of a finished task's images, for its memory: the published protocol
PROJECTION_BATCHES = 100  # of the next task's images, for its projections

FALLBACK_TASK = "task"  # the name of a task that nothing says a name for


def is_task_name(name: str) -> bool:
    """Whether it may name a task: letters, digits, `.`, `_` and `-`, the first no dot; at most 64."""
    return re.fullmatch(r"[\w-][\w.-]{0,63}", name) is not None


def task_name_after(data: Path) -> str:
    """A task's name from where its images are; short enough for a number behind it."""
    return re.sub(r"[^\w.-]+", "-", data.absolute().stem).lstrip(".")[:56] or FALLBACK_TASK


def gradient_name(parameter: str) -> str:
    """The tensor that holds the gradient of a trainable parameter."""
    return f"{parameter}/grad"


def projection_name(layer: str, mode: int) -> str:
    """The projection of one mode of a layer's input: `[n_mode, r_mode]`, orthonormal columns.

    Examples:
        >>> projection_name("blocks.3.conv", 1)
        'blocks.3.conv/U1'
    """
    return f"{layer}/U{mode}"


def core_name(layer: str) -> str:
    """The core that a codec makes of a layer's input, as backward is fed it: `[r1, r0, ...]`."""
    return f"{layer}/G"


def activation_name(layer: str) -> str:
    """A layer's input where a codec compresses it: `[N, C, H, W]`, `[N, T, F]` or `[N, F]`."""
    return f"{layer}/A"


def head_name(task: str, parameter: str) -> str:
    """The array in `weights.npz` of an earlier task's head: of the parameter that the network calls so."""
    return f"heads/{task}/{parameter}"


def forward_role(part: int) -> str:
    """The graph of a part of forward, from 1, where it runs layer by layer."""
    return f"forward-{part}"
