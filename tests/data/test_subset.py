from collections import Counter

import pytest

from lrrobust.data.subset import choose_indices, read_indices
from lrrobust.errors import DataError

LABELS = [0] * 50 + [1] * 3 + [2] * 20 + [7] * 10


def test_draw_is_pinned():
    # Published results name a seed; the images it stands for must never change.
    assert choose_indices(range(100), 5, seed=0, balanced=False) == [9, 15, 17, 69, 79]
    assert choose_indices(LABELS, 6, seed=1, balanced=True) == [5, 31, 51, 59, 68, 77]


@pytest.mark.parametrize("balanced", [False, True])
def test_smaller_draw_is_part_of_a_larger_one(balanced):
    draws = [choose_indices(LABELS, n, seed=3, balanced=balanced) for n in range(1, len(LABELS) + 1)]
    for n, (small, large) in enumerate(zip(draws, draws[1:]), start=1):
        assert len(set(small)) == n and set(small) < set(large)
        assert small == sorted(small)
    assert draws[-1] == list(range(len(LABELS)))


@pytest.mark.parametrize("n", [4, 5, 10, 12, 13, 30, 43, 83])
def test_balanced_counts_differ_only_where_a_class_is_used_up(n):
    available = Counter(LABELS)
    drawn = Counter(LABELS[i] for i in choose_indices(LABELS, n, seed=5, balanced=True))
    most = max(drawn.values())
    assert sum(drawn.values()) == n
    for label, count in available.items():
        assert drawn[label] >= min(count, most - 1)


def test_unbalanced_draw_is_uniform():
    hits = Counter(i for seed in range(400) for i in choose_indices([0] * 10, 3, seed=seed, balanced=False))
    assert all(80 < hits[i] < 165 for i in range(10))  # 120 expected, deviation 9


def test_odd_image_of_a_balanced_draw_goes_to_any_class():
    labels = [0, 0, 1, 1, 2, 2]
    assert {labels[choose_indices(labels, 1, seed=s, balanced=True)[0]] for s in range(30)} == {0, 1, 2}


def test_seed_changes_the_draw():
    assert len({tuple(choose_indices(range(1000), 10, seed=seed, balanced=False)) for seed in range(20)}) == 20


def test_none_means_all():
    assert choose_indices([3, 1, 2], None, seed=0, balanced=True) == [0, 1, 2]


def test_more_than_there_is_names_both_numbers():
    with pytest.raises(DataError, match="84 images asked for, and only 83"):
        choose_indices(LABELS, 84, seed=0, balanced=False)


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_is_refused(n):
    with pytest.raises(DataError, match=f"expected 1 or more, got {n}"):
        choose_indices(LABELS, n, seed=0, balanced=False)


def test_read_indices(tmp_path):
    path = tmp_path / "indices.txt"
    path.write_text("# the hard ones\n12\n\n  3  # a cat\n0\n")
    assert read_indices(path) == [12, 3, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n1\n", r"indices.txt, line 3: 1 stands already on line 1"),
        ("1\n-2\n", r"indices.txt, line 2: expected an integer of 0 or more, found '-2'"),
        ("1.5\n", r"line 1: .*found '1.5'"),
        ("1 2\n", r"line 1: .*found '1 2'"),
        ("\u00b2\n", r"line 1: expected an integer"),
        ("# nothing\n", r"found none"),
        ("9" * 5000, r"line 1: expected an integer"),
    ],
)
def test_bad_index_file_is_refused(tmp_path, text, message):
    path = tmp_path / "indices.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_indices(path)


def test_what_never_ends_is_no_index_file():
    with pytest.raises(DataError, match="index file /dev/null: .*not a regular file"):
        read_indices("/dev/null")


def test_missing_index_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"index file .*none.txt: expected text with one integer a line, found no such file"):
        read_indices(tmp_path / "none.txt")
