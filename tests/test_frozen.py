import torch
from torch import nn

from lrrobust.frozen import frozen


def test_parameters_made_in_inference_mode_are_left_to_fail_by_themselves():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    with frozen(nn.Sequential(model, other)):
        assert not other.weight.requires_grad
    assert other.weight.requires_grad
