import pytest
import torch
from torch.nn.functional import cross_entropy

from lrrobust.attacks.losses import dlr, likely_targets, log_odds, margin, targeted_dlr

LOGITS = torch.tensor([[3.0, 2.0, 0.0, 1.0], [0.0, -1.0, 5.0, 2.0]])
LABELS = torch.tensor([0, 3])
TARGETS = torch.tensor([1, 0])


def towards_next(logits, labels):
    return targeted_dlr(logits, labels, (labels + 1) % logits.shape[1])


LOSSES = pytest.mark.parametrize("loss", [margin, log_odds, dlr, towards_next])


def test_values_by_hand():
    assert margin(LOGITS, LABELS).tolist() == [-1, 3]
    assert dlr(LOGITS, LABELS).tolist() == [-1 / (3 - 1), 3 / (5 - 0)]
    assert targeted_dlr(LOGITS, LABELS, TARGETS).tolist() == [-1 / (3 - 0.5), -2 / (5 + 0.5)]
    torch.testing.assert_close(log_odds(LOGITS, LABELS).exp().log1p(), cross_entropy(LOGITS.double(), LABELS, reduction="none"))


def test_the_margin_is_positive_where_another_class_wins():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) - 10
    labels = torch.arange(50) % 4
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)


@pytest.mark.parametrize("change", [lambda logits: 1e4 * logits, lambda logits: logits - 1e3])
def test_dlr_takes_no_notice_of_scale_and_shift(change):
    logits = LOGITS.double()
    torch.testing.assert_close(dlr(change(logits), LABELS), dlr(logits, LABELS))
    torch.testing.assert_close(targeted_dlr(change(logits), LABELS, TARGETS), targeted_dlr(logits, LABELS, TARGETS))


@LOSSES
@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize("scale", [0.01, 1, 1e4])
def test_losses_have_a_slope_for_any_number_of_classes_and_scale(loss, classes, scale):
    logits = scale * torch.randn(20, classes, generator=torch.Generator().manual_seed(1))
    labels = logits.argmax(1)
    logits.requires_grad_()
    values = loss(logits, labels)
    assert values.shape == (20,) and values.dtype == torch.float64 and values.isfinite().all()
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    if loss is towards_next:
        assert (gradient.gather(1, ((labels + 1) % classes)[:, None]) > 0).all()
    else:
        assert (gradient.gather(1, labels[:, None]) < 0).all()


@LOSSES
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_ties_give_numbers(loss, classes):
    logits = torch.zeros(2, classes, requires_grad=True)
    values = loss(logits, torch.zeros(2, dtype=torch.int64))
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


def test_targets_are_the_likeliest_other_classes():
    assert likely_targets(LOGITS, LABELS, 2).tolist() == [[1, 3], [2, 0]]
    assert likely_targets(LOGITS, LABELS, 9).tolist() == [[1, 3, 2], [2, 0, 1]]
