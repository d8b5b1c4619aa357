"""A quadratic on which the paper's theory can be checked exactly: a 1x1 convolution with a squared loss.

    L(W) = ||W X - Y||^2 / (2 n),    X = A_(1) [C, n],  n = B H W,  W [O, C],  Y [O, n]

With the output gradient D = (W X - Y) / n the exact weight gradient is `g = D X^T`.  LANCE takes it with A
projected in every mode: `g~ = D Q X^T P`, where P = U_1 U_1^T acts on channels and `Q = P_0 x P_2 x P_3`
(Kronecker products) on batch and space.

Projecting channels alone (Q = I) gives `g~ = g P`, so `<g, g~> = ||g P||^2 >= 0`: the guarantee of the paper.

With Q, `<g, g~> = tr(D K Q D^T)`, where `K = X^T P X` [n, n]; its sign is that of the symmetric part of K Q.
In the basis of Q's range and its complement, `K = [[K11, K12], [K12^T, K22]]` and
`K Q + Q K = [[2 K11, K12], [K12^T, 0]]`, which is positive semidefinite only if K12 = 0, that is, if K and Q
commute.  Otherwise some output gradient makes LANCE ascend: an eigenvector of a negative eigenvalue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_edge.energy import rank_for_energy
from lance_host.hosvd import ModeCovariances

Matrix = NDArray[np.float64]
Activation = NDArray[np.float32]  # [B, C, H, W]


@dataclass(frozen=True)
class Quadratic:
    """The loss: inputs as a matrix `x` [C, n], targets `y` [O, n]."""

    x: Matrix
    y: Matrix

    def output_gradient(self, w: Matrix) -> Matrix:
        """D, `[O, n]`."""
        return np.asarray((w @ self.x - self.y) / self.x.shape[1])

    def loss(self, w: Matrix) -> float:
        """L(W)."""
        return float(np.square(w @ self.x - self.y).sum() / (2 * self.x.shape[1]))

    def gradient(self, w: Matrix) -> Matrix:
        """g, `[O, C]`."""
        return self.output_gradient(w) @ self.x.T

    def lance_gradient(self, w: Matrix, p: Matrix, q: Matrix | None = None) -> Matrix:
        """g~, `[O, C]`; without `q` channels alone are projected."""
        d = self.output_gradient(w)
        return np.asarray((d if q is None else d @ q) @ self.x.T @ p)

    def smoothness(self, p: Matrix) -> float:
        """Lipschitz constant of the gradient along the range of p: the largest eigenvalue of P X X^T P / n."""
        projected = p @ self.x
        return float(np.linalg.eigvalsh(projected @ projected.T / self.x.shape[1])[-1])

    def least_within(self, w: Matrix, u: Matrix) -> float:
        """The least loss over `{W + M U^T}`, in closed form: what descent within the subspace can reach."""
        residual, z = self.y - w @ self.x, u.T @ self.x  # z [r, n]
        m = np.linalg.lstsq(z.T, residual.T, rcond=None)[0].T
        return self.loss(w + m @ u.T)


def activation(shape: Sequence[int], seed: int) -> Activation:
    """A batch `[B, C, H, W]` whose modes all have decaying spectra, as activations do."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(tuple(shape))
    for mode, size in enumerate(shape):
        basis = np.linalg.qr(generator.standard_normal((size, size)))[0]
        mixing = basis @ np.diag(1.0 / np.arange(1, size + 1)) @ basis.T
        values = np.moveaxis(np.tensordot(mixing, values, axes=(1, mode)), 0, mode)
    return values.astype(np.float32)


def subspaces(batches: Sequence[Activation], energy: float) -> list[Matrix]:
    """`U_i` of every mode, by the calibration that packages are made with, at the rank of ε."""
    covariances = ModeCovariances(batches[0].shape)
    for batch in batches:
        covariances.add(batch)
    return [
        spectrum.eigenvectors[:, : rank_for_energy(spectrum.eigenvalues, energy)]
        for spectrum in covariances.spectra()
    ]


def projector(u: Matrix) -> Matrix:
    """`U U^T`."""
    return u @ u.T


def batch_and_space(bases: Sequence[Matrix], projected: Sequence[int]) -> Matrix:
    """Q [n, n] of the modes 0, 2, 3 that are projected; the others are whole."""
    factors = [projector(bases[mode]) if mode in projected else np.eye(len(bases[mode])) for mode in (0, 2, 3)]
    return np.asarray(np.kron(np.kron(factors[0], factors[1]), factors[2]))


def channels_by_samples(a: Activation) -> Matrix:
    """A as `X = A_(1)`, `[C, B H W]`, columns in the order of `batch_and_space`."""
    return a.astype(np.float64).transpose(1, 0, 2, 3).reshape(a.shape[1], -1)


def ascent_form(x: Matrix, p: Matrix, q: Matrix) -> Matrix:
    """The symmetric part of K Q, `[n, n]`: `<g, g~> = tr(D form D^T)`."""
    k = x.T @ p @ x
    return (k @ q + q @ k) / 2


def steepest_ascent(x: Matrix, p: Matrix, q: Matrix) -> tuple[float, Matrix]:
    """The least eigenvalue of the form, and its eigenvector as an output gradient `[1, n]`."""
    values, vectors = np.linalg.eigh(ascent_form(x, p, q))
    return float(values[0]), vectors[:, :1].T


def cosine(a: Matrix, b: Matrix) -> float:
    """Of the angle between two matrices; 0 where one of them is zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms else 0.0
