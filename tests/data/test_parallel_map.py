import time

import pytest

from lrrobust.data.parallel_map import map_in_order


@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
def test_results_are_in_order_and_progress_ends_at_the_count(count):
    seen = []
    assert map_in_order(lambda i: i * i, count, lambda done, total: seen.append((done, total))) == [i * i for i in range(count)]
    assert seen == sorted(seen)
    assert count == 0 or seen[-1] == (count, count)


def test_first_error_in_order_is_raised():
    def fail(i):
        if i == 10:
            time.sleep(0.05)  # the later error happens first
            raise ValueError("ten")
        if i == 100:
            raise ValueError("hundred")

    with pytest.raises(ValueError, match="ten"):
        map_in_order(fail, 200)


def test_error_ends_the_work():
    done = []

    def fail(i):
        if i == 0:
            raise ValueError("first")
        time.sleep(0.0002)
        done.append(i)

    with pytest.raises(ValueError, match="first"):
        map_in_order(fail, 20_000)
    assert len(done) < 5_000
