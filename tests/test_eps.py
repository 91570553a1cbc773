import pytest
from pydantic import TypeAdapter, ValidationError

from lrrobust.eps import Ladder, parse_eps, write_eps

LADDER = TypeAdapter(Ladder)


def test_a_ladder_mixes_fractions_and_numbers():
    assert LADDER.validate_json('["0.125/255", 0.25, "1/2"]') == (0.125 / 255, 0.25, 0.5)
    assert LADDER.validate_json('["8/255"]') == (8 / 255,)


@pytest.mark.parametrize(("eps", "written"), [(8 / 255, "8/255"), (0.5, 0.5), (1 / 3, 1 / 3), (8.000001 / 255, 8.000001 / 255)])
def test_budgets_are_written_as_they_are_read(eps, written):
    assert write_eps(eps) == written and parse_eps(written) == eps


@pytest.mark.parametrize("written", ["[]", "[0.2, 0.1]", "[0.1, 0.3, 0.2]", '["1/510", "0.5/255"]', '["1/0"]', "[-1]"])
def test_what_is_no_ladder_is_refused(written):
    with pytest.raises(ValidationError):
        LADDER.validate_json(written)
