"""Constraints and their closure, on hand-made positions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prune2deploy.graph.constraints import FROZEN, Constraint, Count, Equal, Hull, Implies, Positions, classes, close

SIZE = 24


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def closed(constraints: list[Constraint], *start: int, size: int = SIZE) -> set[int]:
    kept = np.zeros(size, dtype=bool)
    kept[list(start)] = True
    return set(np.flatnonzero(close(size, constraints, kept)[0]).tolist()) - {FROZEN}


def test_equal_positions_are_kept_together() -> None:
    constraint = Equal(ids(1, 2), ids(3, 4))
    assert closed([constraint], 1) == {1, 3}
    assert closed([constraint], 4) == {2, 4}


def test_equalities_chain() -> None:
    assert closed([Equal(ids(1), ids(2)), Equal(ids(3), ids(2)), Equal(ids(3), ids(4))], 4) == {1, 2, 3, 4}


def test_a_position_equal_to_the_frozen_one_is_always_kept() -> None:
    assert closed([Equal(ids(5), ids(FROZEN))]) == {5}


def test_an_implication_works_one_way() -> None:
    constraint = Implies(ids(1, 2), ids(3, 4))
    assert closed([constraint], 1) == {1, 3}
    assert closed([constraint], 3) == {3}


def test_a_position_may_imply_several() -> None:
    assert closed([Implies(ids(1, 1), ids(3, 4))], 1) == {1, 3, 4}


def test_a_hull_keeps_a_rectangle_of_cells() -> None:
    # Cells 0..5 as the merged axis 1..6, and as 2 x 3: rows 7, 8 and columns 9, 10, 11.
    hull = Hull(((ids(1, 2, 3, 4, 5, 6),), (ids(7, 8), ids(9, 10, 11))))
    assert closed([hull], 1) == {1, 7, 9}
    assert closed([hull], 1, 5) == {1, 2, 4, 5, 7, 8, 9, 10}, "cells (0,0) and (1,1) span a square"


def test_a_hull_needs_no_cell_where_only_one_axis_is_kept() -> None:
    hull = Hull(((ids(1, 2, 3, 4),), (ids(5, 6), ids(7, 8))))
    assert closed([hull], 5) == {5}
    assert closed([hull], 5, 8) == {2, 5, 8}


def test_a_frozen_axis_of_a_hull_is_whole() -> None:
    hull = Hull(((ids(1, 2, 3, 4),), (ids(5, 6), ids(FROZEN, FROZEN))))
    assert closed([hull], 1) == {1, 2, 5}


def test_counts_are_equal_in_active_rows_and_zero_in_others() -> None:
    count = Count((np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]]),))
    assert closed([count], 2, 3, 6) == {2, 3, 4, 6}


def test_a_row_that_is_active_in_one_column_is_active_in_all() -> None:
    count = Count((np.array([[1, 2], [3, 4]]), np.array([[5, 6, 7], [8, 9, 10]])))
    assert closed([count], 6) == {1, 5 + 1}
    assert closed([count], 6, 7, 4) == {1, 4, 6, 7, 8, 9}


def test_a_count_is_a_multiple_but_never_more_than_there_is() -> None:
    row = np.arange(1, 7)[None]
    assert closed([Count((row,), multiple=4)], 1) == {1, 2, 3, 4}
    assert closed([Count((row,), multiple=4)], 1, 2, 3, 4, 5) == {1, 2, 3, 4, 5, 6}
    assert closed([Count((row,), multiple=4)]) == set()


def test_an_axis_that_must_not_vanish_keeps_its_first_position() -> None:
    assert closed([Count((np.arange(3, 7)[None],), always=True)]) == {3}


def test_constraints_cascade() -> None:
    constraints: list[Constraint] = [
        Implies(ids(1), ids(4)),
        Equal(ids(4), ids(5)),
        Count((np.array([[5, 6, 7, 8]]),), multiple=2),
        Hull(((ids(6, 9, 10, 11),), (ids(12, 13), ids(14, 15)))),
    ]
    assert closed(constraints, 1) == {1, 4, 5, 6, 12, 14}


def test_blocks_number_only_axes_with_positions() -> None:
    positions = Positions()
    positions.add("a", (1, 3, 1, 2))
    assert positions.ids("a", 0) is None
    assert list(positions.blocks()) == [("a", 1, 1, 3), ("a", 3, 4, 2)]
    wire = positions.tripwire(7, 1)
    kept = np.zeros(positions.count, dtype=bool)
    assert positions.tripped(kept) == set()
    kept[wire] = True
    assert positions.tripped(kept) == {(7, 1)}


def test_classes_may_count_what_is_implied_as_tied() -> None:
    constraints: list[Constraint] = [
        Equal(ids(1), ids(2)),
        Implies(ids(3), ids(4)),
        Count((np.array([[5, 6], [7, 8]]),)),
        Hull(((ids(9, 10, 11, 12),), (ids(13, 14), ids(15, 16)))),
    ]
    plain = classes(SIZE, constraints)
    tied = classes(SIZE, constraints, also_implied=True)
    assert plain[1] == plain[2]
    assert plain[3] != plain[4]
    assert tied[3] == tied[4]
    assert (tied[5] == tied[7], tied[6] == tied[8], tied[5] == tied[6]) == (True, True, False)
    assert len({int(tied[i]) for i in range(9, 17)}) == 1


# --- laws -------------------------------------------------------------------------------------------------------------

some_ids = st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=4)


@st.composite
def random_constraints(draw: st.DrawFn) -> list[Constraint]:
    found: list[Constraint] = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(("equal", "implies", "hull", "count")))
        if kind in ("equal", "implies"):
            a = draw(some_ids)
            b = draw(st.lists(st.integers(0, SIZE - 1), min_size=len(a), max_size=len(a)))
            found.append(Equal(ids(*a), ids(*b)) if kind == "equal" else Implies(ids(*a), ids(*b)))
        elif kind == "hull":
            first = draw(st.permutations(range(1, SIZE)))
            found.append(Hull(((ids(*first[:6]),), (ids(*first[6:8]), ids(*first[8:11])))))
        else:
            chosen = np.array(draw(st.permutations(range(1, SIZE)))[:12])
            multiple, always = draw(st.sampled_from((1, 2, 3))), draw(st.booleans())
            found.append(Count((chosen[:6].reshape(2, 3), chosen[6:].reshape(2, 3)), multiple=multiple, always=always))
    return found


@given(random_constraints(), st.lists(st.integers(0, SIZE - 1)))
def test_the_closure_satisfies_every_constraint_and_closing_again_adds_nothing(
    constraints: list[Constraint], start: list[int]
) -> None:
    first = closed(constraints, *start)
    assert set(start) - {FROZEN} <= first
    assert closed(constraints, *first) == first
    kept = np.isin(np.arange(SIZE), [FROZEN, *first])
    for constraint in constraints:
        if isinstance(constraint, Equal):
            assert (kept[constraint.a] == kept[constraint.b]).all()
        else:
            assert kept[constraint.close(kept)].all()


@given(random_constraints().filter(lambda all_: not any(isinstance(one, Count) for one in all_)), st.data())
def test_without_counts_the_closure_is_monotone_and_does_not_depend_on_the_order(
    constraints: list[Constraint], data: st.DataObject
) -> None:
    small = data.draw(st.lists(st.integers(1, SIZE - 1)))
    large = [*small, *data.draw(st.lists(st.integers(1, SIZE - 1)))]
    assert closed(constraints, *small) <= closed(constraints, *large)
    assert closed(data.draw(st.permutations(constraints)), *small) == closed(constraints, *small)
