"""The paper's theory on a quadratic: what holds with exact channel projectors, and what batch and space break.

Everything here is asserted; a claim that does not hold is an error, never a row that nobody reads.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from lance_edge.errors import NumericalError
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Cell, Finding
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.quadratic import (
    Activation,
    Matrix,
    Quadratic,
    activation,
    batch_and_space,
    channels_by_samples,
    cosine,
    projector,
    steepest_ascent,
    subspaces,
)

SHAPE, OUTPUTS, ENERGY = (16, 12, 5, 5), 6, 0.7
POINTS, STEPS, TARGETS = 100, 400, 1000
PATHS, PATH_STEPS = 30, 100
EXACT = 1e-10  # float64 rounding in sums of some thousand terms, relative; measured: below 1e-13
STEPS_SHOWN = (0, 1, 2, 5, 10, 15, 20)  # of the descent on the target that is made against all modes
DESCENT = "on a target made against batch and space, step "
ROUNDING = 1e-12  # of a loss near its minimum
CASES: dict[str, tuple[int, ...]] = {
    "channels": (),
    "channels, batch": (0,),
    "channels, space": (2, 3),
    "all modes": (0, 2, 3),
}


def theory(cells: Cells) -> list[Finding]:
    """Rows of what was asserted, and of how often projections of batch and space ascend.

    Raises:
        NumericalError: if a claim does not hold.
    """
    seed = cells.study.seeds[0]
    a = activation(SHAPE, seed)
    bases = subspaces([a], ENERGY)
    problem = _problem(a, seed)
    findings = [
        _cell("channels", "descent direction: <g, gP> = ‖gP‖²").found(
            "worst_error", [descent_direction(problem, projector(bases[1]), seed)]
        ),
        _cell("channels", "decrease of every step, at least η(1 - ηL/2)‖gP‖²").found(
            "worst_error", [monotone_loss(problem, projector(bases[1]), seed)[0]]
        ),
        _cell("channels", "projected stationarity: the minimum within the subspace").found(
            "worst_error", [projected_stationarity(problem, bases[1], seed)]
        ),
        *_break(cells, a, bases),
        *_frequencies(a, bases, seed),
    ]
    cells.study.say("all assertions hold")
    return findings


def _cell(method: str, setting: str) -> Cell:
    return Cell("theory", "1x1 convolution", "quadratic", method, None, setting)


def _problem(a: Activation, seed: int) -> Quadratic:
    x = channels_by_samples(a)
    return Quadratic(x, np.random.default_rng([seed, 1]).standard_normal((OUTPUTS, x.shape[1])))


def expect(holds: bool, claim: str, found: str) -> None:
    """Assert a claim of the theory.

    Raises:
        NumericalError: with the claim and what was found.
    """
    if not holds:
        raise NumericalError(
            f"theory: expected {claim}, found {found}; either the mathematics here or the linear algebra"
            " library is wrong: please report it"
        )


def descent_direction(problem: Quadratic, p: Matrix, seed: int) -> float:
    """`<g, g P> = ||g P||^2` at random weights: the largest relative difference."""
    generator, worst = np.random.default_rng([seed, 2]), 0.0
    for _ in range(POINTS):
        w = generator.standard_normal((len(problem.y), len(p)))
        full, projected = problem.gradient(w), problem.lance_gradient(w, p)
        square = float(np.square(projected).sum())
        worst = max(worst, abs(float((full * projected).sum()) - square) / square)
        expect(float((full * projected).sum()) > 0, "<g, gP> > 0", f"{float((full * projected).sum())}")
    expect(worst < EXACT, f"<g, gP> = ‖gP‖² to {EXACT:g}", f"{worst:.1e}")
    return worst


def monotone_loss(problem: Quadratic, p: Matrix, seed: int) -> tuple[float, list[float]]:
    """Descent at 1/L: every step decreases the loss by what the descent lemma says, or more.

    Returns:
        The largest violation relative to the first loss (0: none), and the losses.
    """
    smoothness = problem.smoothness(p)
    rate, worst = 1 / smoothness, 0.0
    w = np.random.default_rng([seed, 3]).standard_normal((len(problem.y), len(p)))
    losses = [problem.loss(w)]
    for _ in range(STEPS):
        projected = problem.lance_gradient(w, p)
        least = rate * (1 - rate * smoothness / 2) * float(np.square(projected).sum())
        w = w - rate * projected
        losses.append(problem.loss(w))
        worst = max(worst, (losses[-1] - losses[-2] + least) / losses[0])
        expect(worst < ROUNDING, "the decrease of the descent lemma in every step", f"{worst:.1e} less")
    return worst, losses


def projected_stationarity(problem: Quadratic, u: Matrix, seed: int) -> float:
    """The projected gradient goes to zero at 1/T, and the loss to the minimum within the subspace.

    The full gradient does not: what is left is orthogonal to the subspace.

    Returns:
        How far the last loss is from the minimum in closed form, relative.
    """
    p = projector(u)
    rate = 1 / problem.smoothness(p)
    start = np.random.default_rng([seed, 3]).standard_normal((len(problem.y), len(p)))
    w, least, first = start, np.inf, problem.loss(start)
    minimum = problem.least_within(start, u)
    for step in range(1, STEPS + 1):
        projected = problem.lance_gradient(w, p)
        least = min(least, float(np.square(projected).sum()))
        bound = 2 * (first - minimum) / (rate * step)
        expect(least <= bound * (1 + EXACT), "min ‖gP‖² <= 2 (L(W0) - L*) / (η T)", f"{least} > {bound}")
        w = w - rate * projected
    left = problem.gradient(w)
    expect(
        float(np.linalg.norm(left @ p)) < 1e-6 * float(np.linalg.norm(left)),
        "the rest of the gradient orthogonal to the subspace",
        f"a share of {float(np.linalg.norm(left @ p) / np.linalg.norm(left)):.1e} within it",
    )
    distance = (problem.loss(w) - minimum) / minimum
    expect(abs(distance) < EXACT, "the minimum within the subspace", f"a loss that is {distance:.1e} above")
    return abs(distance)


def _break(cells: Cells, a: Activation, bases: list[Matrix]) -> list[Finding]:
    """A target for which LANCE with all modes ascends, with the subspaces of the very batch that it trains on.

    From W = 0 with Y = -n D the output gradient is D: the eigenvector that `quadratic.py` derives.
    """
    x, p, q = channels_by_samples(a), projector(bases[1]), batch_and_space(bases, CASES["all modes"])
    value, d = steepest_ascent(x, p, q)
    expect(value < 0, "a negative eigenvalue, as K and Q do not commute", f"{value}")
    problem, w = Quadratic(x, -x.shape[1] * d), np.zeros((1, len(p)))
    rate = 1 / problem.smoothness(np.eye(len(p)))
    findings = []
    for name, modes in CASES.items():
        found = problem.lance_gradient(w, p, batch_and_space(bases, modes))
        before, after = problem.loss(w), problem.loss(w - rate * found)
        setting = "one step at 1/L on a target made for it"
        findings += [
            _cell(name, setting).found("least_cosine", [cosine(problem.gradient(w), found)]),
            _cell(name, setting).found("loss_change_percent", [100 * (after - before) / before]),
        ]
        is_guaranteed = not modes
        expect(is_guaranteed <= (after < before), "a decrease with channels alone", f"{before} to {after}")
        if name == "all modes":
            expect(after > before, "an increase with all modes on this target", f"{before} to {after}")
            inner = float((problem.gradient(w) * found).sum())
            expect(abs(inner - value) < EXACT * abs(value), "<g, g~> = the eigenvalue", f"{inner}, {value}")
    cells.study.say(f"a target on which all modes ascend: <g, g~> = {value:.3e}")
    findings += _descent(problem, p, None, "channels")
    return findings + _descent(problem, p, q, "all modes")


def _frequencies(a: Activation, bases: list[Matrix], seed: int) -> list[Finding]:
    """How often projections ascend on random targets: in the first step, and on the way down from it.

    The first step hardly ever does; later ones do.  What is left of the gradient is then what the projections
    do not see, and the point that they lead to is not the minimum.  Subspaces of this batch, and of ten others.
    """
    others = subspaces([activation(SHAPE, seed + 100 + number) for number in range(10)], ENERGY)
    x, findings = channels_by_samples(a), []
    for source, own in (("subspaces of this batch", bases), ("subspaces of ten other batches", others)):
        for name, modes in CASES.items():
            p, q = projector(own[1]), batch_and_space(own, modes) if modes else None
            ascents, least = first_steps(x, p, q, seed)
            rises = rising_steps(x, p, q, seed)
            expect(
                bool(modes) or ascents == rises == 0, "no ascent with channels alone", f"{ascents}, {rises} %"
            )
            cell = _cell(name, f"random targets, {source}")
            findings += [
                cell.found("ascents_percent", [ascents]),
                cell.found("least_cosine", [least]),
                cell.found("rises_percent", [rises]),
            ]
    return findings


def first_steps(x: Matrix, p: Matrix, q: Matrix | None, seed: int) -> tuple[float, float]:
    """Of `TARGETS` random targets, from W = 0: % for which the direction ascends, and the least cosine."""
    generator, w = np.random.default_rng([seed, 4]), np.zeros((OUTPUTS, len(x)))
    cosines = []
    for _ in range(TARGETS):
        problem = Quadratic(x, generator.standard_normal((OUTPUTS, x.shape[1])))
        cosines.append(cosine(problem.gradient(w), problem.lance_gradient(w, p, q)))
    return 100 * float(np.mean(np.array(cosines) < 0)), min(cosines)


def rising_steps(x: Matrix, p: Matrix, q: Matrix | None, seed: int) -> float:
    """% of the steps of `PATHS` descents at 1/L in which the loss rises, by more than rounding."""
    generator, rises = np.random.default_rng([seed, 5]), 0
    for _ in range(PATHS):
        problem = Quadratic(x, generator.standard_normal((OUTPUTS, x.shape[1])))
        w = np.zeros((OUTPUTS, len(x)))
        rate, losses = 1 / problem.smoothness(np.eye(len(x))), [problem.loss(w)]
        for _ in range(PATH_STEPS):
            w = w - rate * problem.lance_gradient(w, p, q)
            losses.append(problem.loss(w))
        rises += sum(after > before * (1 + ROUNDING) for before, after in pairwise(losses))
    return 100 * rises / (PATHS * PATH_STEPS)


def _descent(problem: Quadratic, p: Matrix, projection: Matrix | None, name: str) -> list[Finding]:
    """The loss on the way down at 1/L from W = 0, the first being 1."""
    w, rate = np.zeros((1, len(p))), 1 / problem.smoothness(np.eye(len(p)))
    first, findings = problem.loss(w), list[Finding]()
    for step in range(max(STEPS_SHOWN) + 1):
        if step in STEPS_SHOWN:
            loss = problem.loss(w) / first
            findings.append(_cell(name, f"{DESCENT}{step}").found("loss_ratio", [loss]))
        w = w - rate * problem.lance_gradient(w, p, projection)
    return findings


def draw_descent(path: Path, findings: list[Finding]) -> None:
    """Loss over steps, from one start: channels alone, and all modes on the target made against them."""
    series: dict[str, list[Point]] = {}
    for one in findings:
        if one.quantity == "loss_ratio" and one.measured is not None:
            step = float(one.setting.removeprefix(DESCENT))
            series.setdefault(f"{one.method} projected", []).append((step, one.measured))
    axes = Axes("A target made against batch and space", "step", "loss, first = 1")
    draw_lines(path, Panel(axes, series))
