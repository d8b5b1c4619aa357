"""Convolutions of 1-D and 2-D maps, and transposed ones."""

import torch
import torch.nn.functional as F  # noqa: N812
from conv_cases import ConvCase, conv_cases
from hypothesis import assume
from hypothesis import strategies as st

from rule_cases.case import Case


def conv_2d(case: ConvCase) -> Case:
    return Case(
        {"x": ("N", *case.input_shape), "w": case.weight_shape, "b": (case.out,)},
        lambda x, w, b: case.forward(x, w) + b[:, None, None],
        attributes={
            "strides": case.stride,
            "pads": case.pads,
            "dilations": case.dilation,
            "group": case.groups,
        },
    )


@st.composite
def conv_1d(draw: st.DrawFn) -> Case:
    groups, per_group, out = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (4, 3, 3))
    before, after = draw(st.integers(0, kernel)), draw(st.integers(0, kernel))
    size = max(1, dilation * (kernel - 1) + 1 - before - after) + draw(st.integers(0, 5))

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv1d(F.pad(x, (before, after)), w, b, stride, 0, dilation, groups)

    return Case(
        {"x": ("N", groups * per_group, size), "w": (groups * out, per_group, kernel), "b": (groups * out,)},
        function,
        attributes={"strides": [stride], "pads": [before, after], "dilations": [dilation], "group": groups},
    )


@st.composite
def transposed(draw: st.DrawFn) -> Case:
    """Symmetric padding, as PyTorch has it, and an output padding below the stride, as the runtime has it."""
    rank = draw(st.integers(1, 2))
    groups, per_group, out = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(rank)]

    size, kernel, stride, dilation = sizes(1, 4), sizes(1, 3), sizes(1, 3), sizes(1, 2)
    padding = [draw(st.integers(0, k - 1)) for k in kernel]
    extra = [draw(st.integers(0, s - 1)) for s in stride]
    ends = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, s, p, d, k, e in ends))
    function = F.conv_transpose1d if rank == 1 else F.conv_transpose2d
    return Case(
        {"x": ("N", groups * per_group, *size), "w": (groups * per_group, out, *kernel), "b": (groups * out,)},
        lambda x, w, b: function(x, w, b, stride, padding, extra, groups, dilation),
        attributes={
            "strides": stride,
            "pads": [*padding, *padding],
            "output_padding": extra,
            "dilations": dilation,
            "group": groups,
        },
    )


FIXED: dict[str, list[Case]] = {
    "Conv": [Case({"x": ("N", 4, 3, 3), "w": (5, 4, 1, 1)}, F.conv2d)],
    "ConvTranspose": [
        Case({"x": ("N", 4, 3), "w": (4, 2, 3)}, F.conv_transpose1d),
        Case({"x": ("N", 4, 3, 3), "w": (4, 5, 1, 1)}, F.conv_transpose2d),
        Case(
            {"x": ("N", 3, 3, 4), "w": (3, 1, 3, 3)},
            lambda x, w: F.conv_transpose2d(x, w, groups=3),
            attributes={"group": 3},
        ),
    ],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "Conv": st.one_of(conv_cases().map(conv_2d), conv_1d()),
    "ConvTranspose": transposed(),
}
