"""In processes of their own: a module is imported once per process, and so are C++ operators."""

import subprocess
import sys

import pytest

NEITHER_WARNS_NOR_DIFFERS = """
from lrrobust.torchvision_import import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
import sys
assert sys.modules["torchvision"] is torchvision
assert torchvision.extension is sys.modules["torchvision.extension"]

import torch
from torchvision import models, ops, transforms
assert models.resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
import torchattacks
"""

EXTENSION_MISSING = """
import torch
def refuse(path):
    raise OSError("undefined symbol")
torch.ops.load_library = refuse
"""

NMS = """
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9]])
try:
    kept = ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist()
except RuntimeError as error:
    kept = "incompatible" if "incompatible" in str(error) else str(error)
print(kept)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("warn", ["", "1"])
@pytest.mark.parametrize("before", ["", EXTENSION_MISSING], ids=["as installed", "without extension"])
def test_torchvision_imports_without_a_warning(before, warn):
    environment = {"TORCHVISION_WARN_WHEN_EXTENSION_LOADING_FAILS": warn} if warn else {}
    result = run(before + NEITHER_WARNS_NOR_DIFFERS + NMS, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    # With the extension its own operator answers; without it, its own explanation is heard.
    assert result.stdout.strip() in (["incompatible"] if before else ["[0]", "incompatible"])


def test_declared_operators_give_way_to_those_that_exist():
    """Stands for an extension that loads: its operator is there before the import and must stay."""
    result = run(
        EXTENSION_MISSING
        + """
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: dets + 7, "CPU")
from lrrobust.torchvision_import import _declare_missing_operators, import_torchvision
import_torchvision()
assert _declare_missing_operators.cache_info().currsize == 0
assert torch.ops.torchvision.nms(torch.zeros(1), torch.zeros(1), 0.5).item() == 7
"""
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_other_failures_of_torchvision_are_not_hidden():
    result = run(
        """
import sys
from lrrobust.torchvision_import import import_torchvision
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.models":
            raise RuntimeError("broken models")
sys.meta_path.insert(0, Broken())
import_torchvision()
"""
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RuntimeError: broken models"
