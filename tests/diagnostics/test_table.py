import pytest

from lrrobust.diagnostics.table import count_results
from lrrobust.tables import Cell, Column, Table


@pytest.mark.parametrize(
    "results, line",
    [
        (["passed", "not known"], "checks: 1 passed, 1 not known"),
        (
            ["FAILED"],
            "checks: 1 FAILED: robust accuracies may be too high; --suite strong (strong_l2, strong_l1) finds "
            "more, and --suite blackbox needs no gradients",
        ),
        (["not known"], "checks: 1 not known"),
    ],
)
def test_what_the_checks_come_to(results, line):
    headings = ("run", "check", "attack", "result", "what was found")
    rows = [[Cell(text, text) for text in ("first", "noise", "pgd", result, "So.")] for result in results]
    assert count_results(Table([Column(heading) for heading in headings], rows)) == line
