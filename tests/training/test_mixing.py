import pytest
import torch
from pydantic import ValidationError

from lrrobust.training.mixing import MixingSpec, draw_mixing, mix

COUNT = 6


@pytest.fixture
def batch():
    """Image i holds the value i everywhere: what is in a pixel says whose it is."""
    return torch.arange(COUNT).float().view(-1, 1, 1, 1).expand(COUNT, 3, 20, 30).clone(), torch.tensor([0, 1, 2, 3, 4, 4])


def draw(count=4000, seed=0, **settings):
    spec = MixingSpec(**{"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "share": 1.0, **settings})
    return draw_mixing(count, spec, torch.Generator().manual_seed(seed))


def test_mixup_blends_neighbours_and_their_labels(batch):
    images, labels = batch
    drawn = torch.zeros(COUNT, 4)
    drawn[:, 0] = torch.tensor([0.7, 0.6, 1.0, 0.2, 0.5, 0.3])
    mixed, targets = mix(images, labels, 5, drawn)
    assert mixed[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.6 * 1, 2, 0.2 * 3 + 0.8 * 2, 4.5, 0.3 * 5 + 0.7 * 4])
    assert mixed.flatten(1).std(1).max() < 1e-5
    torch.testing.assert_close(targets[0], torch.tensor([0.7, 0.3, 0, 0, 0]))
    torch.testing.assert_close(targets[3], torch.tensor([0, 0, 0.8, 0.2, 0]))
    # Both of one class.
    torch.testing.assert_close(targets[4], torch.tensor([0, 0, 0, 0, 1.0]))


def test_cutmix_pastes_a_box_and_shares_by_its_area(batch):
    images, labels = batch
    drawn = torch.tensor(
        [[0.75, 1.0, x, y] for x, y in [(0.5, 0.5), (0.0, 0.0), (1.0, 0.5), (0.5, 0.25), (0.5, 0.5), (0.5, 0.5)]]
    )
    mixed, targets = mix(images, labels, 5, drawn)
    assert sorted(mixed[0].unique().tolist()) == [0, 1]
    assert (mixed[0, 0] == 1).nonzero().amin(0).tolist() == [5, 8] and (mixed[0, 0] == 1).nonzero().amax(0).tolist() == [14, 21]
    # In a corner a quarter of the box is left: 5 x 8 pixels, sides rounded.
    assert (mixed[1, 0] == 0).sum() == 5 * 8
    for image, target, own, other in zip(mixed[:4], targets, (0, 1, 2, 3), (1, 0, 3, 2)):
        share = (image[0] == own).float().mean()
        torch.testing.assert_close(target[own], share)
        torch.testing.assert_close(target[other], 1 - share)
    torch.testing.assert_close(targets.sum(1), torch.ones(COUNT))


def test_the_last_of_an_odd_number_stays(batch):
    images, labels = batch
    drawn = torch.tensor([[0.5, 0.0, 0.5, 0.5]]).expand(5, 4)
    mixed, targets = mix(images[:5], labels[:5], 5, drawn)
    torch.testing.assert_close(mixed[4], images[4])
    assert targets[4].tolist() == [0, 0, 0, 0, 1]


def test_a_part_of_a_batch_is_mixed_as_in_the_whole(batch):
    images, labels = batch
    drawn = draw(COUNT, mixup_alpha=1.0, cutmix_alpha=1.0)
    whole, part = mix(images, labels, 5, drawn), mix(images[2:4], labels[2:4], 5, drawn[2:4])
    torch.testing.assert_close(part, (whole[0][2:4], whole[1][2:4]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_distribution_asked_for(alpha):
    own = draw(mixup_alpha=alpha)[:, 0]
    assert own.mean().item() == pytest.approx(0.5, abs=0.03)
    assert own.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_which_are_mixed_and_how():
    both = draw(mixup_alpha=1.0, cutmix_alpha=1.0, share=0.6)
    is_mixed = both[:, 0] < 1
    assert is_mixed.float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert both[is_mixed, 1].mean().item() == pytest.approx(0.5, abs=0.04)
    assert draw(mixup_alpha=1.0)[:, 1].sum() == 0 and draw(cutmix_alpha=1.0)[:, 1].min() == 1
    torch.testing.assert_close(draw(mixup_alpha=0.3), draw(mixup_alpha=0.3), rtol=0, atol=0)
    assert not torch.equal(draw(mixup_alpha=0.3), draw(mixup_alpha=0.3, seed=1))


def test_mixing_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="expected mixup_alpha or cutmix_alpha above 0"):
        MixingSpec(mixup_alpha=0.0, cutmix_alpha=0.0, share=0.5)
