import pytest
import torch

from lrrobust.errors import ConfigError
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.processes import choose_device, choose_sharing


def test_auto_device_is_one_that_works():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("name", "message"), [("tpu", "only cpu and cuda.*cpu, cuda or auto"), ("cuda:99", "try cpu or auto")])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_work_is_shared_where_it_is_asked_for_or_torchrun_says_so():
    assert choose_sharing(False, {}) is None
    assert choose_sharing(False, {"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert choose_sharing(True, {}) == Sharing(0, 1)
    assert choose_sharing(False, {"WORLD_SIZE": "4", "RANK": "3"}) == Sharing(3, 4)
    assert choose_sharing(True, {"LRROBUST_LEASE_S": "7"}).lease_s == 7


@pytest.mark.parametrize("value", ["", "-1", "four", "1.5", "9" * 30])
def test_what_is_no_number_in_the_environment_is_named(value):
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number"):
        choose_sharing(True, {"WORLD_SIZE": value})
