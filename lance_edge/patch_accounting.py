"""The figures of `accounting.py` for convolutions in patch mode: bytes and multiply-adds.

Notation: B images, g groups, D = C/groups k_h k_w inputs of a filter, L output positions, O outputs; ranks r0
(batch), r1 (inputs), r2 (positions).  A mode whose rank is its size is kept whole: it has no factor and no
products.  Where nothing but the inputs' mode is cut and the coefficients would be no smaller than the input,
the input is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lance_edge.accounting import FLOAT32_BYTES, bp_activation_bytes, bp_forward_macs, bp_weight_gradient_macs
from lance_edge.manifest import Layer
from lance_edge.moments import mode_sizes


@dataclass(frozen=True)
class PatchCost:
    """What a convolution costs at a batch size and ranks (batch, inputs, positions)."""

    layer: Layer
    batch_size: int
    ranks: Sequence[int]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return mode_sizes(self.layer, "patch", self.batch_size)

    @property
    def keeps_input(self) -> bool:
        """Whether the input is kept in place of the coefficients (see `patch_forms.keeps_input`)."""
        (batch, _, positions), (r0, r1, r2) = self._sizes, self.ranks
        is_larger = self.layer.groups * r1 * r2 >= math.prod(self.layer.input_shape)
        return (r0, r2) == (batch, positions) and is_larger

    @property
    def factor_bytes(self) -> int:
        """U0 `[B, r0]`, U1 `[g, D, r1]` and U2 `[L, r2]`, each where its mode is cut; U1 always."""
        (batch, inputs, positions), (r0, r1, r2) = self._sizes, self.ranks
        values = self.layer.groups * inputs * r1
        values += batch * r0 * (r0 != batch) + positions * r2 * (r2 != positions)
        return FLOAT32_BYTES * values

    @property
    def activation_bytes(self) -> int:
        """Core `[g r1, r0, r2]` and factors; or the input and U1."""
        if self.keeps_input:
            return bp_activation_bytes(self.layer, self.batch_size) + self.factor_bytes
        return FLOAT32_BYTES * self.layer.groups * math.prod(self.ranks) + self.factor_bytes

    @property
    def forward_macs(self) -> int:
        """The layer, the convolution with g r1 filters, and the products with U2 and U0."""
        macs = bp_forward_macs(self.layer, self.batch_size)
        if self.keeps_input:
            return macs
        (batch, inputs, positions), (r0, r1, r2) = self._sizes, self.ranks
        channels = self.layer.groups * r1
        macs += batch * positions * channels * inputs
        macs += batch * channels * positions * r2 * (r2 != positions)
        return macs + batch * channels * r2 * r0 * (r0 != batch)

    @property
    def weight_gradient_macs(self) -> int:
        """The output gradient on U2 and U0, its product with the core, and the inputs expanded.

        Where the input is kept: the exact gradient, projected on U1 and back.
        """
        (batch, inputs, positions), (r0, r1, r2) = self._sizes, self.ranks
        outputs = self.layer.weight_shape[0]
        if self.keeps_input:
            return bp_weight_gradient_macs(self.layer, self.batch_size) + 2 * outputs * inputs * r1
        on_positions = batch * outputs * positions * r2 * (r2 != positions)
        on_batch = batch * outputs * r2 * r0 * (r0 != batch)
        return on_positions + on_batch + r0 * outputs * r1 * r2 + outputs * inputs * r1
