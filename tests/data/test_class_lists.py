import re
import subprocess
import sys

import pytest

from lrrobust.data import class_lists
from lrrobust.data.class_lists import load_class_list, match_classes
from lrrobust.errors import DataError, UnknownNameError


@pytest.mark.parametrize(("name", "length"), [("tiny-imagenet-200", 200), ("imagenet-1k", 1000)])
def test_packaged_lists_are_whole(name, length):
    classes = load_class_list(name)
    assert len(classes) == len(set(classes)) == length
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)


def test_imagenet_is_sorted_and_tiny_imagenet_is_not():
    assert list(class_lists.IMAGENET_1K) == sorted(class_lists.IMAGENET_1K)
    assert list(class_lists.TINY_IMAGENET_200) != sorted(class_lists.TINY_IMAGENET_200)
    assert load_class_list("imagenet-1k") is class_lists.IMAGENET_1K


@pytest.mark.parametrize(
    ("label", "wnid"),
    # Published names of these: Egyptian cat, school bus, fly, altar, African elephant.
    [(0, "n02124075"), (15, "n04146614"), (113, "n02190166"), (185, "n02699494"), (199, "n02504458")],
)
def test_known_labels_of_tiny_imagenet(label, wnid):
    assert class_lists.TINY_IMAGENET_200[label] == wnid


@pytest.mark.parametrize(("label", "wnid"), [(0, "n01440764"), (779, "n04146614"), (999, "n15075141")])
def test_known_labels_of_imagenet(label, wnid):
    assert class_lists.IMAGENET_1K[label] == wnid


def test_unknown_constant_is_an_attribute_error():
    with pytest.raises(AttributeError, match="CIFAR_10"):
        _ = class_lists.CIFAR_10


def test_own_file_keeps_its_order(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfdog\r\ncat \r\nold english sheepdog\r\n")
    assert load_class_list(path) == load_class_list(str(path)) == ("dog", "cat", "old english sheepdog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"dog\ncat\ndog\n", r"line 3: class 'dog' stands already on line 1"),
        (b"dog\n\ncat\n", r"line 2: .*empty line"),
        (b"", r"is empty"),
        (b"\xff\xfe\xfa", r"UTF-8"),
    ],
)
def test_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        load_class_list(path)
    assert str(path) in str(caught.value)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean imagenet-1k"):
        load_class_list("imagenet1k")


def test_labels_follow_the_class_list_and_not_what_is_present():
    assert match_classes(["zebra", "cat", "fly", "cat"], ["fly", "dog", "cat"]) == ([1, 2, 3], [2, 0, 2])


def test_known_classes_narrow_the_match_and_leave_labels_alone():
    assert match_classes(["cat", "fly", "cat"], ["fly", "dog", "cat"], known_classes=["cat"]) == ([0, 2], [2, 2])


def test_class_named_twice_is_refused():
    with pytest.raises(DataError, match="'dog' more than once"):
        match_classes(["cat"], ["dog", "cat", "dog"])


def test_naming_a_data_set_does_not_load_torch():
    code = "import sys, lrrobust.data.sources, lrrobust.data.subset; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_accents_in_one_character_or_two_are_the_same():
    assert match_classes(["be\u0301e", "b\xe9e", "bee"], ["b\xe9e", "bee"]) == ([0, 1, 2], [0, 0, 1])
    assert match_classes(["b\xe9e"], ["ant", "be\u0301e"], ["be\u0301e"]) == ([0], [1])
    with pytest.raises(DataError, match="more than once"):
        match_classes([], ["be\u0301e", "b\xe9e"])
