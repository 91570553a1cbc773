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
