import pytest
from pydantic import TypeAdapter, ValidationError

from lrrobust.eps import Ladder

LADDER = TypeAdapter(Ladder)


def test_a_ladder_mixes_fractions_and_numbers():
    assert LADDER.validate_json('["0.125/255", 0.25, "1/2"]') == (0.125 / 255, 0.25, 0.5)
    assert LADDER.validate_json('["1e-3"]') == (0.001,)


@pytest.mark.parametrize("written", ["[]", "[0.2, 0.1]", "[0.1, 0.3, 0.2]", '["x"]', '["1/510", "0.5/255"]', '["1/0"]', "[-1]"])
def test_what_is_no_ladder_is_refused(written):
    with pytest.raises(ValidationError):
        LADDER.validate_json(written)
