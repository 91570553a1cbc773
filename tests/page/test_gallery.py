import base64
import io

import numpy as np
import pytest
from PIL import Image

from lrrobust.page.gallery import build_gallery
from lrrobust.results import Example, RunStore, load_examples, load_run


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2]))))


@pytest.fixture
def gallery(make_run):
    runs = {"a": make_run("a"), "b": make_run("b", model="other")}
    return build_gallery(runs, {"a": "A", "b": "B"})


def test_the_first_images_that_every_model_classifies_correctly(gallery):
    assert {attack: [image.index for image in images] for attack, images in gallery.attacks.items()} == {
        "cw": [1, 2, 3],
        "pgd": [1, 2, 3],
    }
    assert [attempt.run for attempt in gallery.attacks["pgd"][0].attempts] == ["A", "B"]
    assert gallery.missing == [] and gallery.reason is None


def test_pictures_and_captions(gallery, make_run):
    first, second, third = gallery.attacks["pgd"]
    clean = load_examples(make_run("a"))["pgd"][0].clean
    np.testing.assert_array_equal(pixels(first.clean), clean)
    attempt = first.attempts[0]
    assert (first.true_class, attempt.predicted, attempt.detail) == ("ant", "cat", "linf distance 0.9/255, within eps 1/255")
    assert second.attempts[0].detail == "linf distance 1.9/255, within eps 2/255"
    np.testing.assert_allclose(pixels(attempt.adversarial), np.minimum(clean / 255 + 0.01, 1) * 255, atol=0.6)
    # 32 is the largest power of two that keeps 0.01 within 0.5.
    assert attempt.factor == 32
    np.testing.assert_allclose(pixels(attempt.perturbation), 255 * (0.5 + 32 * 0.01), atol=0.6)
    failed = third.attempts[0]
    assert failed.adversarial is None and failed.detail == "none found at linf eps 2/255 or below"
    assert gallery.attacks["cw"][2].attempts[0].detail == "l2 distance 0.6"
    assert gallery.attacks["cw"][0].attempts[0].detail == "l2 distance 0.2, within eps 0.5"


def test_runs_without_examples_are_named(make_run):
    runs = {"a": make_run("a"), "old": make_run("old", with_examples=False)}
    gallery = build_gallery(runs, {"a": "A", "old": "Old"})
    assert gallery.missing == ["Old"] and [a.run for a in gallery.attacks["pgd"][0].attempts] == ["A"]
    alone = build_gallery({"old": runs["old"]}, {"old": "Old"})
    assert not alone.attacks and "kept no adversarial images" in alone.reason


def test_no_image_in_common(make_run):
    runs = {"a": make_run("a"), "b": make_run("b", model="other")}
    for path in (runs["b"].folder / "examples").iterdir():
        path.unlink()
    with RunStore.create_or_resume(runs["b"].folder, {**runs["b"].manifest}) as store:
        store.write_examples("pgd", 0, 6, [Example(0, np.zeros((8, 8, 3), np.uint8), None)])
    gallery = build_gallery({name: load_run(run.folder) for name, run in runs.items()}, {"a": "A", "b": "B"})
    assert not gallery.attacks and "correctly by every model" in gallery.reason


def test_classes_without_names_are_numbers(make_run):
    gallery = build_gallery({"a": make_run("a", class_names=None)}, {"a": "A"})
    image = gallery.attacks["pgd"][0]
    assert (image.true_class, image.attempts[0].predicted) == ("class 1", "class 3")


def test_pictures_are_few_however_many_the_runs(make_run):
    runs = {str(place): make_run(str(place)) for place in range(30)}
    gallery = build_gallery(runs, {name: name for name in runs})
    count = sum(1 + 2 * len(image.attempts) for images in gallery.attacks.values() for image in images)
    assert count <= 160 and all(len(images) == 1 for images in gallery.attacks.values())
