"""The page of the cells, and what all cells lean on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from cells import alone, assert_as_close, build, run
from forwards import error

from scripts.docs.composition import MODELS, PAGE, ROWS, with_table


@pytest.mark.parametrize("name", MODELS)
def test_psa_alone_at_factor_one_is_dense_attention(name):
    """What all the cells lean on."""
    dense, calls_dense = alone(name, "dense")
    one, calls_one = alone(name, "one")
    pipe = build(name).to(torch.float64)
    assert_as_close(one, dense, run(pipe, name))
    assert [call[:2] for call in calls_one] == [call[:2] for call in calls_dense]
    assert {kind for *_, kind in calls_one} == {"sparse"}
    sparse, calls_sparse = alone(name, "sparse")
    assert error(sparse, dense) > 100 * error(one, dense), "PSA must matter in these cells"
    assert {kind for step, _, kind in calls_sparse if step == 0} == {"dense"}
    assert {kind for step, _, kind in calls_sparse if step > 0} == {"sparse"}


def all_tests() -> dict[str, bool]:
    """Every test of this folder, and whether it is one of a row."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.name not in found, f"{node.name} stands twice"
                marks = [ast.unparse(mark).partition("(")[0] for mark in node.decorator_list]
                found[node.name] = "composes" in marks
    return found


def test_every_test_here_is_a_row_of_the_table():
    tests = all_tests()
    assert sorted(test for test, is_row in tests.items() if is_row) == sorted(f"test_{row.name}" for row in ROWS)
    assert len(ROWS) == len(tests) - 3, "this one, the next, and what all cells lean on"
    titles = [row.title for row in ROWS]
    assert len(set(titles)) == len(titles)
    for row in ROWS:
        assert set(row.cells) == set(MODELS), f"{row.title}: a cell is silent"


def test_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- table -->" in page
    assert with_table(page) == page, "run python -m scripts.docs.composition"
