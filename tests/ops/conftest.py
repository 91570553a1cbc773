"""Without a GPU the Triton kernels are interpreted, which triton decides once, when it is first imported."""

import importlib.util
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # torch's compiler imports it too: so here, before any test runs.
    assert "triton" not in sys.modules, "something imported triton before it could be told to interpret its kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import lrrobust.ops._triton  # noqa: F401
