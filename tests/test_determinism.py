import subprocess
import sys

import pytest
import torch

from lrrobust.determinism import deterministic_float32, float32_settings, seeded, tf32_products

CPU = torch.device("cpu")


def settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark


@pytest.fixture
def fast_settings():
    """What a program may have asked for; pytest's monkeypatch cannot take it back from torch's modules."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = settings()
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = True, True, False, True
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def test_no_tf32_inside_and_the_settings_of_before_afterwards(fast_settings):
    with pytest.raises(KeyError), deterministic_float32():
        assert settings() == (False, False, True, False)
        raise KeyError
    assert settings() == (True, True, False, True)


def test_products_alone_may_take_tf32(fast_settings):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.raises(KeyError), tf32_products():
        assert settings() == (False, True, False, True)
        raise KeyError
    assert settings() == (False, False, False, True)


def test_settings_tell_apart_what_computes_otherwise(fast_settings):
    found = float32_settings()
    with deterministic_float32():
        assert float32_settings() != found
    assert float32_settings() == found
    with tf32_products():  # on already
        assert float32_settings() == found


_NEW_SETTINGS = """
import torch
from lrrobust.determinism import deterministic_float32, tf32_products
backends = torch.backends
if not hasattr(backends, "fp32_precision"):
    raise SystemExit
backends.fp32_precision = "tf32"
try:
    backends.cuda.matmul.allow_tf32
except RuntimeError:
    pass
else:
    raise SystemExit("torch reads the old settings")
kinds = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
with deterministic_float32():
    assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 3
    with tf32_products():
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee", "tf32"]
    assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 3
assert [kind.fp32_precision for kind in kinds] == ["tf32"] * 3
"""


def test_a_program_that_uses_the_settings_of_newer_versions():
    # In a process of its own: torch cannot be brought back to where it reads both.
    done = subprocess.run([sys.executable, "-c", _NEW_SETTINGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_random_numbers_of_a_seed_and_of_before():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(CPU, 5):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(CPU, 5):
        assert torch.equal(torch.rand(2), inside)


_PROCESSORS = """
import torch
from lrrobust.determinism import arithmetic_kept, deterministic_float32

def state():
    mkldnn = torch.backends.mkldnn
    kinds = [mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision] if hasattr(mkldnn, "matmul") else []
    try:
        old = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        old = None
    return old, kinds, torch.is_autocast_enabled("cpu"), torch.empty(0).device

def is_bf16():
    mkldnn = torch.backends.mkldnn
    if hasattr(mkldnn, "matmul"):
        return "bf16" in (mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision)
    return torch.get_float32_matmul_precision() == "medium"

asked = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__(),
    "device": lambda: torch.set_default_device("meta"),
}
if hasattr(torch.backends.mkldnn, "matmul"):
    asked["matmul"] = lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")
    asked["conv"] = lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16")
before = state()
for name, ask in asked.items():
    with arithmetic_kept():
        ask()
        found = state()
        assert found != before, name
        with deterministic_float32():
            product = torch.ones(2, 2, device="cpu") @ torch.ones(2, 2, device="cpu")
            assert product.dtype == torch.float32 and not is_bf16(), name
        assert state() == found, name
    assert state() == before, (name, state(), before)
    assert not torch.overrides._get_current_function_mode_stack(), name
"""


def test_products_on_processors_and_autocast_around_are_float32_as_well():
    # In a process of its own, as above.
    done = subprocess.run([sys.executable, "-W", "error", "-c", _PROCESSORS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
