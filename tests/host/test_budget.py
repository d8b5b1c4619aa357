"""The knapsack against brute force, and what a budget may be written as."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import conv_layer

from lance_edge.errors import LanceError
from lance_host import budget
from lance_host.budget import (
    check_budget,
    choose,
    parse_budget,
    plan_budget,
    total_bytes,
    total_error,
)
from lance_host.error_table import Candidate, frontier
from lance_host.perplexity import LayerChoices, SearchResult

KIB = 1 << 10


def candidate(values: int, error: float) -> Candidate:
    return Candidate((values,), 4 * values, error)  # sizes are whole float32 values


candidates = st.lists(
    st.builds(candidate, st.integers(1, 60), st.floats(0, 100, allow_subnormal=False)), min_size=1, max_size=7
).map(frontier)
problems = st.lists(candidates, min_size=1, max_size=4)


def brute_force(frontiers, limit):
    """The least total error of every combination that fits."""
    fitting = (one for one in itertools.product(*frontiers) if total_bytes(one) <= limit)
    return min(map(total_error, fitting))


@given(problems, st.data())
def test_the_choice_is_the_best_that_fits(frontiers, data):
    least, most = (sum(one[place].nbytes for one in frontiers) for place in (0, -1))
    limit = data.draw(st.integers(least, most + 8))
    chosen = choose(frontiers, limit)
    assert len(chosen) == len(frontiers)
    assert all(one in layer for one, layer in zip(chosen, frontiers, strict=True))
    assert total_bytes(chosen) <= limit
    # Sums of four numbers in two orders differ by their rounding.
    assert total_error(chosen) == pytest.approx(brute_force(frontiers, limit), rel=1e-12)


@settings(max_examples=50)
@given(problems, st.data())
def test_large_budgets_are_discretised_upwards(frontiers, data):
    """With 16 cells instead of 65536: never over budget, and best among sizes rounded up to cells."""
    least, most = (sum(one[place].nbytes for one in frontiers) for place in (0, -1))
    limit = data.draw(st.integers(least, most + 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "CELLS", 16)
        chosen = choose(frontiers, limit)
    assert total_bytes(chosen) <= limit
    cell = 4 * -(-limit // 64)
    rounded = [[Candidate(c.ranks, -(-c.nbytes // cell) * cell, c.error) for c in layer] for layer in frontiers]
    if sum(layer[0].nbytes for layer in rounded) <= limit // cell * cell:
        expected = brute_force(rounded, limit // cell * cell)
    else:
        expected = total_error([layer[0] for layer in frontiers])
    assert total_error(chosen) == pytest.approx(expected, rel=1e-12)


def test_an_equally_good_choice_takes_fewer_bytes():
    frontiers = [[candidate(1, 5.0), candidate(3, 1.0)], [candidate(2, 4.0), candidate(9, 2.0)]]
    assert choose(frontiers, 4 * 11) == [frontiers[0][1], frontiers[1][0]]


def test_refuses_what_does_not_fit_and_names_what_would():
    with pytest.raises(LanceError, match="memory budget: expected at least 12B, found 11B; give more"):
        choose([[candidate(1, 5.0)], [candidate(2, 4.0)]], 11)


# --- the plan -------------------------------------------------------------------------------------------


def search_result(*layers):
    choices = [
        LayerChoices(f"layer{index}", tuple(options), uniform, 10.0)
        for index, (options, uniform) in enumerate(layers)
    ]
    return SearchResult(0.7, tuple(choices))


def test_a_plan_has_ranks_and_errors_of_both():
    first = ([candidate(1, 5.0), candidate(3, 1.0)], candidate(2, 4.5))
    second = ([candidate(2, 4.0), candidate(9, 2.0)], candidate(3, 3.5))
    plan = plan_budget("lance", 20, search_result(first, second))
    assert plan.ranks == {"layer0": (3,), "layer1": (2,)}
    assert plan.relative_error(plan.chosen) == pytest.approx((1 + 4) / 20)
    assert plan.relative_error(plan.uniform) == pytest.approx((4.5 + 3.5) / 20)


def test_the_single_energy_is_taken_where_rounding_made_it_better(monkeypatch):
    monkeypatch.setattr(budget, "CELLS", 2)  # the better candidate of 20 bytes no longer fits into 24
    layer = ([candidate(1, 5.0), candidate(5, 1.0)], candidate(5, 1.0))
    other = ([candidate(1, 5.0)], candidate(1, 5.0))
    assert plan_budget("lance", 24, search_result(layer, other)).ranks == {"layer0": (5,), "layer1": (1,)}


def test_no_gradient_at_all_has_no_relative_error():
    layer = LayerChoices("dead", (candidate(1, 0.0),), candidate(1, 0.0), 0.0)
    plan = plan_budget("lance", 20, SearchResult(1.0, (layer,)))
    assert plan.relative_error(plan.chosen) == 0.0


# --- the text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "256kb", "-1KiB", "0B", "0", "1e3B", "KiB", "1,5MiB", "nanB"])
def test_refuses_what_is_no_size(text):
    with pytest.raises(LanceError, match=f"expected a size such as 512B, 256KiB or 1.5MiB, found {text!r}"):
        parse_budget(text, ("lance",)) if text else parse_budget("lance=", ("lance",))


def test_budgets_of_methods():
    assert parse_budget("256KiB", ("lance", "bp")) == {"lance": 256 * KIB}
    assert parse_budget("1KiB", ("lance", "asi", "bp")) == {"lance": KIB, "asi": KIB}
    assert parse_budget("asi=1KiB, lance=2KiB", ("lance", "asi")) == {"asi": KIB, "lance": 2 * KIB}


@pytest.mark.parametrize("text", ["bp=1KiB", "asi=1KiB", "=1KiB", "lance=1KiB,2KiB"])
def test_refuses_budgets_of_other_methods(text):
    found = text.rsplit(",", maxsplit=1)[-1]
    expected = f"--memory-budget: expected a budget for lance, found {found!r}; write it as 256KiB, or for each"
    with pytest.raises(LanceError, match=re.escape(expected)):
        parse_budget(text, ("lance", "bp"))


def test_refuses_a_budget_where_no_ranks_are_fixed():
    expected = "expected one of the methods lance, asi, whose ranks are fixed before training; found bp"
    with pytest.raises(LanceError, match=re.escape(expected)):
        parse_budget("1KiB", ("bp",))


LAYER = conv_layer(3, (4, 4), 2)  # rank 1 everywhere: 1 + 8 + 3 + 4 + 4 values; the input has 8 * 48


def test_a_budget_between_rank_one_and_the_inputs_can_be_met():
    for nbytes in (2 * 80, 2 * 1536 - 1):
        check_budget("lance", nbytes, [(LAYER, LAYER)], 8)


def test_refuses_a_budget_below_rank_one_everywhere():
    expected = (
        "--memory-budget of lance: expected at least 160B (rank 1 in every mode of the 2 layers, batch size 8),"
        " found 159B; give more, or train fewer layers"
    )
    with pytest.raises(LanceError, match=re.escape(expected)):
        check_budget("lance", 159, [(LAYER,), (LAYER, LAYER)], 8)


def test_refuses_a_budget_that_holds_the_inputs_themselves():
    expected = (
        "--memory-budget of asi: the inputs of the 1 layers fit as they are (1536B at batch size 8, budget"
        " 2000B); train with the method bp, or give less"
    )
    with pytest.raises(LanceError, match=re.escape(expected)):
        check_budget("asi", 2000, [(LAYER,), (LAYER, LAYER)], 8)
