"""For each operator, nodes and the same functions in PyTorch: `FIXED` by hand, `RANDOM` drawn by hypothesis."""

from hypothesis import strategies as st

from rule_cases import (
    activation,
    convolution,
    elementwise,
    indexing,
    norm,
    pooling,
    product,
    reduction,
    shape,
)
from rule_cases.case import Case

_FAMILIES = (activation, convolution, elementwise, indexing, norm, pooling, product, reduction, shape)
FIXED: dict[str, list[Case]] = {op: cases for family in _FAMILIES for op, cases in family.FIXED.items()}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    op: cases for family in _FAMILIES for op, cases in family.RANDOM.items()
}
