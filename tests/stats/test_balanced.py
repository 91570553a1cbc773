import numpy as np
import pytest

from lrrobust.stats import balanced_share, wilson_interval


def test_by_hand():
    # Class shares 1/4, 1 and 0; weights of an image 1/12, 1/6, 1/3; sum of their squares 4/144 + 2/36 + 1/9.
    found = balanced_share([1, 0, 0, 0, 1, 1, 0], list("aaaabbc"))
    assert found.share == pytest.approx(5 / 12)
    assert found.effective_n == pytest.approx(1 / (4 / 144 + 2 / 36 + 1 / 9))


def test_even_classes_are_plain_accuracy():
    is_success = np.arange(60) % 7 < 3
    found = balanced_share(is_success, np.arange(60) % 12)
    assert found.effective_n == pytest.approx(60)
    assert found[:3] == pytest.approx((is_success.mean(), *wilson_interval(int(is_success.sum()), 60)))


@pytest.mark.parametrize("value", [True, False])
def test_all_and_none(value):
    found = balanced_share([value] * 9, [0, 0, 0, 0, 0, 0, 1, 1, 2])
    assert found.share == value and (found.high if value else found.low) == value and 0.2 < found.high - found.low < 1


def test_always_saying_the_commonest_class_earns_its_share_alone():
    labels = np.repeat(np.arange(100), [100, *[1] * 99])
    assert balanced_share(labels == 0, labels).share == pytest.approx(0.01)


def test_no_images():
    assert np.isnan(balanced_share([], []).share) and balanced_share([], [])[1:3] == (0, 1)


#: As uneven as the 500 photos: one class of 91 images, many of one.
UNEVEN = np.array([91, 40, 30, *[12] * 10, *[5] * 30, *[1] * 69])


@pytest.mark.parametrize("of_many, of_few", [(0.5, 0.5), (0.05, 0.5), (0.5, 0.05), (0.9, 0.1), (0.02, 0.02), (0.1, 0.9)])
def test_covers_as_often_as_it_says(of_many, of_few):
    shares = np.where(UNEVEN >= 12, of_many, of_few)
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(len(UNEVEN)), UNEVEN)
    covered = []
    for _ in range(500):
        found = balanced_share(generator.random(len(classes)) < np.repeat(shares, UNEVEN), classes)
        covered.append(found.low <= shares.mean() <= found.high)
    # Standard error 1 point.
    assert 0.92 <= np.mean(covered)


@pytest.mark.parametrize(("images", "shares"), [([3, 300], [0.5, 0.999]), ([6, *[200] * 9], [0.3, *[0.0] * 9])])
def test_a_few_images_of_a_rare_class_leave_much_open(images, shares):
    """None of them may be a success by chance, and then nothing of the other classes says how many could be."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        is_success = generator.random(sum(images)) < np.repeat(shares, images)
        found = balanced_share(is_success, np.repeat(np.arange(len(images)), images))
        covered.append(found.low <= np.mean(shares) <= found.high)
    assert 0.92 <= np.mean(covered)
