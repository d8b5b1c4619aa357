"""How a layer trains with projections, planned on the board: ranks within a given structure, and costs."""

from collections.abc import Collection, Sequence

from lance_edge import accounting
from lance_edge.manifest import Layer, LayerPlan, Mode
from lance_edge.moments import mode_sizes
from lance_edge.patch_accounting import PatchCost
from lance_edge.spectrum import ModeSpectrum


def any_ranks(
    layer: Layer,
    mode: Mode,
    batch_size: int,
    spectra: Sequence[ModeSpectrum],
    energy: float,
    compressed: Collection[int],
) -> tuple[int, ...]:
    """The rank of every mode for graphs that take any rank, 1 or more (a basis of zeros where none is left).

    Args:
        spectra: of every mode.
        energy: ε that each compressed mode keeps.
        compressed: the modes that the graphs compress; all others are whole.
    """
    sizes = mode_sizes(layer, mode, batch_size)
    return tuple(
        max(1, spectra[index].rank(energy)) if index in compressed else size for index, size in enumerate(sizes)
    )


def plan_layer(
    layer: Layer, mode: Mode, batch_size: int, spectra: Sequence[ModeSpectrum], ranks: Sequence[int]
) -> LayerPlan:
    """What a layer costs with projections of these ranks (`lance`), and what they keep."""
    kept = tuple(one.kept(rank) for one, rank in zip(spectra, ranks, strict=True))
    if mode == "patch" and not layer.is_linear:
        cost = PatchCost(layer, batch_size, ranks)
        return LayerPlan(
            layer=layer.name,
            ranks=tuple(ranks),
            energy_kept=kept,
            activation_bytes=cost.activation_bytes,
            forward_macs=cost.forward_macs,
            weight_gradient_macs=cost.weight_gradient_macs,
            factor_bytes=cost.factor_bytes,
        )
    return LayerPlan(
        layer=layer.name,
        ranks=tuple(ranks),
        energy_kept=kept,
        activation_bytes=accounting.factored_activation_bytes(layer, batch_size, ranks),
        forward_macs=accounting.lance_forward_macs(layer, batch_size, ranks),
        weight_gradient_macs=accounting.lance_weight_gradient_macs(layer, batch_size, ranks),
    )
