import pytest
import torch

from lrrobust.errors import ModelError
from lrrobust.out_of_memory import is_out_of_memory


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("cublas: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.raises(RuntimeError) as really:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(really.value)
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ModelError("out of memory"))
