import os
import sys

import pytest
import torch
from own_process import environment, run_process
from torch import nn

from lrrobust.models.layer_code import code_of_layers

SOURCE = """
import torch
from torch import nn

class Base(nn.Module):
    def scale(self, images, by=2):
        return by * images

class Layer(Base):
    def __init__(self, mode="a", function=lambda x: x):
        super().__init__()
        self.mode, self.function, self.shared = mode, function, [object()]

    @torch.no_grad()
    def forward(self, images):
        # A comment.
        return self.scale(self.function(images)) if self.mode in {"a", "b", "c", "d"} else images

    @property
    def size(self):
        return (lambda: 3)()
"""


def code(source=SOURCE, made="Layer()"):
    namespace = {"__name__": "cell"}
    exec(source, namespace)
    return code_of_layers(nn.Sequential(eval(made, namespace), nn.ReLU()))


def test_what_is_computed_is_seen_and_how_it_is_written_is_not():
    assert code() == code(SOURCE.replace("# A comment.", "# Another.\n")) and b"0x" not in code()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("by * images", "by + images"),
        ("by=2", "by=3"),
        ("else images", "else -images"),
        ('"d"}', '"e"}'),
        ("lambda: 3", "lambda: 4"),
    ],
)
def test_every_change_of_code_is_seen(old, new):
    assert code(SOURCE.replace(old, new)) != code()


@pytest.mark.parametrize("made", ["Layer('z')", "Layer(function=lambda x: -x)"])
def test_attributes_are_seen(made):
    assert code(made=made) != code()


def test_modes_and_parameters_are_not_of_the_code():
    network = nn.Sequential(nn.Linear(2, 2))
    before = code_of_layers(network.train())
    with torch.no_grad():
        network[0].weight += 1
    assert code_of_layers(network.eval()) == before


def test_it_is_the_same_in_every_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"from lrrobust.models.layer_code import code_of_layers\nexec({SOURCE!r})\nimport hashlib\n"
        "print(hashlib.sha256(code_of_layers(Layer())).hexdigest())\n"
    )
    path = os.pathsep.join(sys.path)
    found = set()
    for seed in "123":
        done = run_process(sys.executable, script, env=environment(PYTHONHASHSEED=seed, PYTHONPATH=path), check=True)
        found.add(done.stdout)
    assert len(found) == 1
