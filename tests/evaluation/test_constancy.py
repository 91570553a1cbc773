import pytest
import torch
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.constancy import Constancy

IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A linear model whose `after` is called after each forward."""

    def __init__(self, after=lambda model: None):
        super().__init__()
        self.layer = nn.Linear(48, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("never", torch.tensor([float("nan")]))
        self.shift, self.after = 0.0, after

    def forward(self, images):
        logits = self.layer(images.flatten(1)) + self.shift
        self.after(self)
        return logits


def drift(model):
    with torch.no_grad():
        model.layer.weight += 1e-7


def count(model):
    model.count += 1


def shift(model):
    model.shift += 1e-3


def replace(model):
    model.layer = nn.Linear(48, 3)


def test_a_steady_model_passes_also_with_nan_in_a_buffer():
    constancy = Constancy(Model(), IMAGES, 1e-4)
    for _ in range(3):
        constancy.check()


@pytest.mark.parametrize(
    "after, what",
    [(drift, "'layer.weight'"), (count, "'count'"), (replace, "'layer.weight'"), (shift, "logits")],
)
def test_a_model_that_changes_in_forward_is_refused(after, what):
    model = Model(after)
    constancy = Constancy(model, IMAGES, 1e-4)
    model(IMAGES)
    with pytest.raises(ModelError, match=f"the model changes while it is evaluated: .*{what}") as caught:
        constancy.check()
    assert "\n" not in str(caught.value)


def test_logits_that_turn_into_nan_are_a_change():
    model = Model()
    constancy = Constancy(model, IMAGES, 1e-4)
    model.shift = float("nan")
    with pytest.raises(ModelError, match="differ by nan"):
        constancy.check()


def test_a_buffer_filled_by_the_first_forward_is_no_change():
    def fill(model):
        if "cache" not in dict(model.named_buffers()):
            model.register_buffer("cache", torch.ones(3))

    Constancy(Model(fill), IMAGES, 1e-4).check()


@pytest.mark.parametrize("size", [0.01, 1, 100])
def test_rounding_is_no_change_at_any_size_of_logits(size):
    model = Model()
    with torch.no_grad():
        model.layer.weight.copy_(size * torch.linspace(-1, 1, 144).view(3, 48))
        model.layer.bias.zero_()
    constancy = Constancy(model, IMAGES, 1e-4)
    model.shift = 1e-5 * size
    constancy.check()
    model.shift = torch.tensor([[0.0], [size]])
    with pytest.raises(ModelError, match="differ by"):
        constancy.check()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_buffers_are_compared():
    model = Model()
    model.register_buffer("table", torch.quantize_per_tensor(torch.rand(4, 4), 0.1, 0, torch.quint8))
    other = torch.quantize_per_tensor(torch.rand(4, 4) + 1, 0.1, 0, torch.quint8)
    constancy = Constancy(model, IMAGES, 1e-4)
    constancy.check()
    model.table = other
    with pytest.raises(ModelError, match="'table' is not what it was"):
        constancy.check()
