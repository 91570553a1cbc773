"""Every shipped recipe, for one epoch of a few images through the command that trains."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lrrobust.cli import run
from lrrobust.data.class_lists import load_class_list
from lrrobust.errors import DataError
from lrrobust.models import load_classifier, registry
from lrrobust.models.weights import read_metadata
from lrrobust.train import TrainingRequest, prepare_training
from lrrobust.training.images import StreamedImages, TrainingSet
from lrrobust.training.recipe import RECIPES_FOLDER, load_recipe

RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


@pytest.fixture
def smaller(tmp_path, tiny_lr_net, monkeypatch):
    """smaller(recipe name, **changes) -> a file of it with one short epoch of small images and batches."""

    monkeypatch.setattr("lrrobust.train.NETWORKS", registry.NETWORKS)

    def write(name, **changes):
        content = yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text())
        content |= {"phases": [{"epochs": 1, "size": 16}], "image_size": 16, "batch_size": 8, "holdout": 4}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.fixture
def photos(tmp_path):
    """photos(recipe name) -> folder of class folders with photos of several sizes, 24 in four classes."""

    def write(name):
        generator = np.random.default_rng(0)
        for i in range(24):
            folder = tmp_path / "photos" / load_class_list(load_recipe(name).classes)[i % 4]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (20 + i % 3, 22 + i % 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / "photos"

    return write


def train(recipe, data, out):
    return ["train", "--model", "tiny", "--recipe", str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu"]


@pytest.mark.parametrize("name", RECIPES)
def test_trains_from_images_to_weights(name, smaller, photos, tmp_path, capsys):
    arguments = train(smaller(name), photos(name), tmp_path / "out")
    arguments += ["--evaluate-on", str(photos(name)), "--workers", "0"]
    with torch.random.fork_rng():
        assert run(arguments) == 0, capsys.readouterr().err
    recipe = load_recipe(name)
    metadata = read_metadata(tmp_path / "out" / "tiny-custom.safetensors")
    assert (metadata.stem, metadata.classes) == (recipe.stem, load_class_list(recipe.classes))
    assert metadata.input_size == 16 and metadata.resize_size == (18 if recipe.loading == "stream" else 16)
    assert metadata.training["steps"] == 2 and metadata.accuracy[-1].n == 24
    assert {"checkpoint.pt", "log.csv", "learning_curve.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    weights = str(tmp_path / "out" / "tiny-custom.safetensors")
    assert load_classifier("tiny", weights=weights, imagenet_classes=()).input_size == 16
    # The same command again finds nothing left to do.
    before = (tmp_path / "out" / "log.csv").read_bytes()
    assert run(arguments) == 0
    assert (tmp_path / "out" / "log.csv").read_bytes() == before


@pytest.mark.parametrize("size", [16, 24])
def test_a_recipe_that_ends_at_another_size_is_warned_of(size, smaller, photos, tmp_path, caplog):
    path = smaller("tiny_imagenet_short", phases=[{"epochs": 1, "size": size}])
    request = TrainingRequest("tiny", str(path), str(photos("tiny_imagenet_short")), tmp_path / "out", device="cpu")
    prepare_training(request)
    told = [message for message in caplog.messages if "ends at" in message]
    assert len(told) == (size != 16) and all("ends at 24 pixels, and its networks are for 16" in each for each in told)


def test_the_size_that_is_warned_of_is_that_of_the_epoch_to_stop_after(smaller, photos, tmp_path, caplog):
    path = smaller("tiny_imagenet_short", phases=[{"epochs": 1, "size": 24}, {"epochs": 1, "size": 16}])
    request = TrainingRequest("tiny", str(path), str(photos("tiny_imagenet_short")), tmp_path / "out", device="cpu")
    prepare_training(request)
    assert "ends at" not in caplog.text
    prepare_training(replace(request, stop_after=1))
    assert "ends at 24 pixels, and its networks are for 16" in caplog.text


def test_stop_after_at_the_command_line(smaller, photos, tmp_path, capsys):
    path = smaller("tiny_imagenet_short", phases=[{"epochs": 2, "size": 16}])
    arguments = train(path, photos("tiny_imagenet_short"), tmp_path / "out")
    for options, code, said in (
        (["--stop-after", "3"], 2, "error: --stop-after: expected 1 to 2"),
        (["--stop-after", "1"], 0, ""),
        ([], 0, "going on at step 2 of 4"),
        (["--stop-after", "1"], 2, "expected at most step 2, the end of epoch 1, for --stop-after 1, found step 4"),
    ):
        with torch.random.fork_rng():
            assert run([*arguments, *options]) == code
        err = capsys.readouterr().err
        assert said in err and (code == 0 or err.count("\n") == 1)
        if code == 0:
            training = read_metadata(tmp_path / "out" / "tiny-custom.safetensors").training
            assert (training["epochs"], training["schedule_epochs"]) == (1 if options else 2, 2)


@pytest.mark.parametrize("name", RECIPES)
def test_where_images_are_kept(name, smaller, photos, tmp_path):
    request = TrainingRequest("tiny", str(smaller(name)), str(photos(name)), tmp_path / "out", device="cpu")
    training, _ = prepare_training(request)
    assert isinstance(training.train_set, StreamedImages if name.startswith("imagenet") else TrainingSet)


def test_classes_that_are_not_trained_are_warned_of(smaller, photos, tmp_path, caplog):
    path, folder = smaller("tiny_imagenet_short"), photos("tiny_imagenet_short")
    first, *wnids = sorted(each.name for each in folder.iterdir())
    for file in sorted((folder / first).iterdir())[1:]:
        file.unlink()  # so that its only image is held out
    (tmp_path / "classes.txt").write_text("\n".join([*wnids[:2], first, "misspelt"]))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "classes": str(tmp_path / "classes.txt")}))
    prepare_training(TrainingRequest("tiny", str(path), str(folder), tmp_path / "out", device="cpu"))
    assert f"classes that the recipe does not name: left out: 1, such as '{wnids[2]}'" in caplog.text
    assert f"classes that the recipe names, without an image to train on: 2, such as '{first}'" in caplog.text


def test_archives_that_processes_cannot_share_are_not_streamed(smaller, photos, tmp_path):
    recipe = str(smaller("imagenet_lrnet"))
    for kind in ("zip", "gztar", "tar"):
        archive = shutil.make_archive(str(tmp_path / "packed"), kind, photos("imagenet_lrnet"))
        request = TrainingRequest("tiny", recipe, archive, tmp_path / kind, device="cpu", workers=2)
        if kind == "tar":
            prepare_training(request)
            continue
        with pytest.raises(DataError, match=re.escape("unpack it into class folders, or give --workers 0")):
            prepare_training(request)
