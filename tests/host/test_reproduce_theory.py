"""The quadratic of `lance-host reproduce theory`, against autograd and projections written out mode by mode."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lance_edge.errors import NumericalError
from lance_host.reproduce.quadratic import (
    Quadratic,
    activation,
    ascent_form,
    batch_and_space,
    channels_by_samples,
    projector,
    steepest_ascent,
    subspaces,
)
from lance_host.reproduce.theory import (
    ENERGY,
    descent_direction,
    expect,
    monotone_loss,
    projected_stationarity,
)

SHAPE, OUTPUTS = (6, 5, 4, 3), 3


@pytest.fixture(scope="module")
def case():
    a = activation(SHAPE, 1)
    x = channels_by_samples(a)
    generator = np.random.default_rng(2)
    problem = Quadratic(x, generator.standard_normal((OUTPUTS, x.shape[1])))
    return a, problem, generator.standard_normal((OUTPUTS, SHAPE[1])), subspaces([a], ENERGY)


def outputs_as_maps(values):
    """`[O, B H W]` to `[B, O, H, W]`."""
    batch, _, height, width = SHAPE
    return torch.from_numpy(values.reshape(OUTPUTS, batch, height, width)).movedim(0, 1).contiguous()


def autograd_gradient(a, problem, w, weight_input):
    """Of the mean square through a 1x1 convolution; the weight's gradient taken with another input."""
    weight = torch.from_numpy(w)[:, :, None, None].requires_grad_()
    output = torch.nn.functional.conv2d(torch.from_numpy(a).double(), weight)
    loss = (output - outputs_as_maps(problem.y)).square().sum() / (2 * problem.x.shape[1])
    (dy,) = torch.autograd.grad(loss, output)
    again = torch.nn.functional.conv2d(weight_input, weight)
    (gradient,) = torch.autograd.grad(again, weight, dy)
    return loss.item(), gradient[:, :, 0, 0].numpy()


def test_loss_and_gradient_are_those_of_a_convolution(case):
    a, problem, w, _ = case
    loss, gradient = autograd_gradient(a, problem, w, torch.from_numpy(a).double())
    assert problem.loss(w) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(problem.gradient(w), gradient, rtol=1e-11)


@pytest.mark.parametrize("modes", [(), (0,), (2, 3), (0, 2, 3)])
def test_lances_gradient_is_that_of_the_input_projected_mode_by_mode(case, modes):
    a, problem, w, bases = case
    projected = torch.from_numpy(a).double()
    for mode in (1, *modes):
        p = torch.from_numpy(bases[mode] @ bases[mode].T)
        projected = torch.einsum("ij,j...->i...", p, projected.movedim(mode, 0)).movedim(0, mode)
    _, expected = autograd_gradient(a, problem, w, projected)
    found = problem.lance_gradient(w, projector(bases[1]), batch_and_space(bases, modes))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_the_claims_hold_with_channel_projectors(case):
    _, problem, _, bases = case
    assert descent_direction(problem, projector(bases[1]), seed=0) < 1e-10
    worst, losses = monotone_loss(problem, projector(bases[1]), seed=0)
    assert worst < 1e-12
    assert all(after <= before for before, after in pairwise(losses))
    assert projected_stationarity(problem, bases[1], seed=0) < 1e-10


def test_what_is_no_projector_fails_the_claim(case):
    """The assertions can fail: a matrix that is not its own square breaks the first of them."""
    _, problem, _, bases = case
    with pytest.raises(
        NumericalError, match=r"theory: expected <g, gP> = ‖gP‖² to 1e-10, found .*please report"
    ):
        descent_direction(problem, 0.5 * projector(bases[1]), seed=0)
    with pytest.raises(NumericalError, match="the decrease of the descent lemma in every step"):
        monotone_loss(problem, -projector(bases[1]), seed=0)


def test_a_claim_that_holds_says_nothing():
    expect(True, "this", "that")


def test_batch_and_space_break_the_guarantee_exactly_where_they_do_not_commute(case):
    _a, problem, _w, bases = case
    x, p = problem.x, projector(bases[1])
    q = batch_and_space(bases, (0, 2, 3))
    value, d = steepest_ascent(x, p, q)
    assert value < -1e-6
    made = Quadratic(x, -x.shape[1] * d)
    w = np.zeros((1, SHAPE[1]))
    inner = (made.gradient(w) * made.lance_gradient(w, p, q)).sum()
    assert inner == pytest.approx(value, rel=1e-9)
    for rate in (1e-3, 1e-5):  # however short the step
        assert made.loss(w - rate * made.lance_gradient(w, p, q)) > made.loss(w)
    _, vectors = np.linalg.eigh(x.T @ p @ x)
    commuting = vectors[:, -7:] @ vectors[:, -7:].T  # spanned by eigenvectors of K
    assert np.linalg.eigvalsh(ascent_form(x, p, commuting))[0] > -1e-9


def test_subspaces_of_the_least_loss(case):
    """The closed form against what a library's least squares gives for the same unknowns, flattened."""
    _, problem, w, bases = case
    u = bases[1]
    system = np.kron(np.eye(OUTPUTS), (u.T @ problem.x).T)  # unknowns: rows of M
    residual = (problem.y - w @ problem.x).ravel()
    _, squares, *_ = np.linalg.lstsq(system, residual, rcond=None)
    assert problem.least_within(w, u) == pytest.approx(squares[0] / (2 * problem.x.shape[1]), rel=1e-9)
