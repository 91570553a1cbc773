import pytest
import torch
from torch import nn

from lrrobust.attacks.assignment import Assignment
from lrrobust.attacks.targets import choose_targets, with_the_choice
from lrrobust.errors import ConfigError

LOGITS = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 5.0, 1.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
LABELS = torch.tensor([0, 3, 1])


class Shown(nn.Module):
    """The logits of the image whose number stands in its pixels; counts what it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        rows = images[:, 0, 0, 0].long()
        self.seen += rows.tolist()
        return LOGITS[rows]


def choose(target, count=2, levels=(1, 2, 1), batch_size=2):
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    model = Shown()
    given = Assignment(model, images, LABELS, (1.0,), torch.tensor(levels), batch_size, claim=None, draw=None)
    return choose_targets(given, target, count), model


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("top_k", [[2, 3], [1, 2], [0, 2]]),
        # Of the last image the label is not the likeliest class, of the second not the least likely either.
        ("least_likely", [[1], [0], [3]]),
        ("random", [[2, 3, 1], [1, 2, 0], [0, 2, 3]]),
        (2, [[2], [2], [2]]),
        # Images of the class itself go to the likeliest other one.
        (0, [[2], [0], [0]]),
    ],
)
def test_each_image_gets_its_targets_and_never_its_label(target, expected):
    chosen, model = choose(target)
    assert chosen.tolist() == expected and sorted(model.seen) == [0, 1, 2]
    assert (chosen != LABELS[:, None]).all()


def test_only_images_that_are_attacked_are_looked_at():
    chosen, model = choose("top_k", levels=(0, 1, 0))
    assert model.seen == [1] and chosen.shape == (3, 2) and chosen[1].tolist() == [1, 2]
    chosen, model = choose("top_k", levels=(0, 0, 0))
    assert model.seen == [] and len(chosen) == 3


def test_more_targets_than_classes_are_all_of_them_and_unknown_classes_are_refused():
    assert choose("top_k", count=9)[0].shape == (3, 3)
    with pytest.raises(ConfigError, match="target: expected a class from 0 to 3, those of the model, found 4"):
        choose(4)


def test_the_choice_is_a_pass_of_the_first_budget():
    passes = torch.tensor([[0, 0, 3], [0, 2, 4]])
    assert with_the_choice(passes).tolist() == [[0, 0, 4], [0, 3, 4]]
    assert passes.tolist() == [[0, 0, 3], [0, 2, 4]]
