import gc
import weakref

import pytest
import torch

from lrrobust.errors import ModelError
from lrrobust.evaluation.memory import FittingBatch

CPU = torch.device("cpu")


@pytest.mark.parametrize("fits, tried", [(32, [32]), (16, [32, 16]), (9, [32, 16, 8]), (1, [32, 16, 8, 4, 2, 1])])
def test_halves_until_it_fits_and_stays_there(fits, tried, caplog):
    sizes = []

    def work(size):
        sizes.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("no room")
        return "done"

    batch = FittingBatch(32, CPU)
    assert batch.run(work) == "done" and sizes == tried
    assert batch.run(work) == "done" and sizes == [*tried, tried[-1]] and batch.size == tried[-1]
    assert len(caplog.messages) == (fits < 32)
    assert fits == 32 or "out of memory on cpu with 32 images at once" in caplog.text


def test_odd_sizes_come_down_to_one():
    sizes = []

    def work(size):
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("no room")

    FittingBatch(7, CPU).run(work)
    assert sizes == [7, 4, 2, 1]


def test_nothing_fits():
    def work(size):
        raise torch.OutOfMemoryError("tried to\nallocate 3 GiB")

    with pytest.raises(ModelError, match="out of memory on cpu with a single image.*tried to allocate 3 GiB") as caught:
        FittingBatch(4, CPU).run(work)
    assert "\n" not in str(caught.value)


def test_other_failures_pass_through():
    def work(size):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        FittingBatch(4, CPU).run(work)


def test_what_filled_the_memory_is_gone_before_the_next_try():
    class Tensors:
        pass

    filled = []

    def work(size):
        if size == 4:
            hog = Tensors()
            filled.append(weakref.ref(hog))
            raise torch.OutOfMemoryError("no room")
        return filled[0]()

    gc.disable()
    try:
        assert FittingBatch(4, CPU).run(work) is None
    finally:
        gc.enable()
