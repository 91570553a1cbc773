import pytest
import torch
from torch import nn

from lrrobust.evaluation.model_check import check_model
from lrrobust.frozen import frozen

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Ending(nn.Module):
    """The linear classifier with something at its end."""

    def __init__(self, linear, end):
        super().__init__()
        self.linear, self.end = linear, end

    def forward(self, images):
        return self.end(self.linear(images))


@pytest.fixture
def check(linear_problem):
    def run(end):
        # Small, so that the softmax is not 0 and 1 already.
        return check_model(Ending(linear_problem(1, classes=3, slope=0.1).model, end), 3, IMAGES)

    return run


def test_probabilities_are_said_aloud(check, caplog):
    assert check(lambda logits: logits.softmax(1)) == {"probabilities": "instead of logits: attacks are weakened"}
    assert "return the logits" in caplog.text


@pytest.mark.parametrize(
    "end",
    [
        lambda logits: logits,
        torch.relu,
        lambda logits: logits.log_softmax(1),
        # They add up to 1, but some are negative.
        lambda logits: torch.cat([3 * logits[:, :2], 1 - 3 * logits[:, :2].sum(1, keepdim=True)], 1),
    ],
    ids=["logits", "not negative", "log-probabilities", "adding up to 1"],
)
def test_logits_are_not_taken_for_probabilities(check, caplog, end):
    assert check(end) == {}
    assert not caplog.records


def test_an_exported_program_has_no_mode():
    # `torch.export` leaves programs that refuse eval() and train().
    model = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (IMAGES,)).module()
    with pytest.raises(NotImplementedError):
        model.eval()
    with frozen(model):
        assert torch.equal(model(IMAGES), model(IMAGES))
