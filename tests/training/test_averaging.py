import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lrrobust.cli import run
from lrrobust.data.class_lists import load_class_list
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.training_images import load_training_images
from lrrobust.errors import ConfigError, WeightsError
from lrrobust.models.registry import build_network
from lrrobust.models.weights import (
    WeightsMetadata,
    fit_weights,
    quantise,
    read_metadata,
    read_weights,
    save_weights,
    tensors_sha256,
)
from lrrobust.training import averaging
from lrrobust.training.averaging import average_weights
from lrrobust.training.export import HELD_OUT
from lrrobust.training.images import TrainingSet
from lrrobust.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("tiny_lr_net")


class Images:
    """As much of `TrainingImages` as is needed."""

    def __init__(self, count):
        self.pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.labels = torch.zeros(count, dtype=torch.int64)

    def whole(self, positions, preprocessing, batch_size):
        assert len(positions) <= batch_size and preprocessing.input_size == 16
        yield self.pixels[list(positions)], self.labels[list(positions)]


@pytest.fixture
def images():
    return Images(40)


def umask():
    found = os.umask(0)
    os.umask(found)
    return found


def write(folder, name, seed=0, model="tiny", classes=tuple("abcdefgh"), **changes):
    torch.manual_seed(seed)
    network = build_network(model, len(classes))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
    metadata = WeightsMetadata(
        name=name, model=model, description="", classes=classes, input_size=16, resize_size=16, interpolation="bilinear",
        recipe={"name": name.lower()}, training={"images": 40, "steps": 3}, accuracy=(),
    ).model_copy(update=changes)  # fmt: skip
    path = folder / f"{name}.safetensors"
    save_weights(path, quantise(network.state_dict()), metadata)
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path, "A", 1), write(tmp_path, "B", 2)]


def test_the_mean_by_shares(files, images):
    states = [read_weights(path)[0] for path in files]
    network, metadata = average_weights(files, [1, 3], images)
    assert not network.training
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.data, (0.25 * states[0][name].double() + 0.75 * states[1][name].double()).float())
    assert metadata.name == "B" and metadata.accuracy == ()
    averaged = [
        {
            "name": name,
            "sha256": tensors_sha256(state),
            "share": share,
            "recipe": read_metadata(file).recipe_identity,
            "followed": "",
        }
        for name, state, share, file in zip("AB", states, (0.25, 0.75), files)
    ]
    assert metadata.training == {
        "images": 40, "steps": 3, "averaged": averaged, "statistics_images": 40, "held_out_unseen": True,
    }  # fmt: skip


def test_the_mean_says_how_far_its_recipes_were_followed(tmp_path, images):
    initial = {"name": "A", "sha256": "ab", "recipe": "long 12", "stages": [[8, 17]]}
    about = {"images": 40, "epochs": 2, "schedule_epochs": 11, "initial_weights": initial}
    files = [write(tmp_path, "A", 1), write(tmp_path, "B", 2, training=about | {"wall_s": 9.0})]
    metadata = average_weights(files, [1, 3], images)[1]
    assert about.items() <= metadata.training.items() and "wall_s" not in metadata.training
    assert metadata.followed == "8 of 17 epochs, then 2 of 11"


def test_statistics_are_those_of_the_images(files, images):
    network, _ = average_weights(files, [1, 1], images)
    features = network[0](images.pixels / 255)
    norm = network[1]
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, features.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert norm.momentum == 0.1


def test_images_are_taken_in_batches_alike(files, monkeypatch):
    monkeypatch.setattr(averaging, "_AT_ONCE", 8)
    sizes = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: sizes.append(len(x)) or x)
    average_weights(files, [1, 1], Images(21))
    # Three norms, two batches.
    assert sizes == [11] * 3 + [10] * 3


@pytest.mark.parametrize("count", [129, 255, 5000, 8191, 90_000])
def test_images_from_all_over_the_set_are_taken(count, monkeypatch):
    asked = []

    class Many:
        labels = torch.zeros(count)

        def whole(self, positions, preprocessing, batch_size):
            asked.append(positions)
            yield torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None

    taken = averaging._take_statistics(nn.Sequential(nn.BatchNorm2d(3)), Many(), Preprocessing(16))
    seen = sorted(position for positions in asked for position in positions)
    assert len(seen) == taken == len({*seen}) and max(map(len, asked)) - min(map(len, asked)) <= 1
    assert min(count, averaging.STATISTICS_IMAGES // 2) <= taken <= averaging.STATISTICS_IMAGES
    # No class of two hundred is left out, nor of a batch much more than of another.
    assert seen[0] == 0 and seen[-1] > (count - 1) * 199 / 200
    assert all(positions[-1] > 0.9 * count for positions in asked)


def test_images_of_a_class_side_by_side_are_spread_over_the_batches(files, monkeypatch):
    monkeypatch.setattr(averaging, "_AT_ONCE", 10)
    images = Images(40)
    images.pixels = (images.pixels * torch.linspace(0.1, 1, 40).view(-1, 1, 1, 1)).byte()
    network, _ = average_weights(files, [1, 1], images)
    torch.testing.assert_close(network[1].running_var, network[0](images.pixels / 255).var((0, 2, 3)), rtol=0.05, atol=1e-5)


def test_what_was_averaged_is_part_of_the_recipe(files, images):
    plain = read_weights(files[1])[1].recipe_identity
    by_shares = [average_weights(files, shares, images)[1].recipe_identity for shares in ([1, 1], [2, 2], [1, 3])]
    assert by_shares[0] == by_shares[1] and len({plain, *by_shares}) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_size": 32}, "B.safetensors has input_size 32, .*A.safetensors has 16: average weights of one network"),
        ({"stem": "small"}, "has stem small, .* has imagenet"),
        ({"classes": (*"abcdefgx",)}, "has other classes, .* has its own"),
        ({"model": "other"}, "has model other, .* has tiny"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, images, changes, says):
    files = [write(tmp_path, "A", 1), write(tmp_path, "B", 2, **changes)]
    with pytest.raises(WeightsError, match=says):
        average_weights(files, [1, 1], images)


def test_weights_that_say_nothing_are_refused(tmp_path, images):
    torch.save(build_network("tiny", 8).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(WeightsError, match="plain.pt is not a weights file of lrrobust"):
        average_weights([write(tmp_path, "A"), tmp_path / "plain.pt"], [1, 1], images)


@pytest.mark.parametrize(
    ("count", "shares", "says"),
    [
        (1, [1], "expected two files of weights to average at least, found 1"),
        (2, [1], "--share: expected a number above 0 for each of the 2 files, found 1"),
        (2, [1, 0], "found 1, 0"),
        (2, [1, float("inf")], "found 1, inf"),
        (2, [], "found none"),
    ],
)
def test_shares_that_do_not_fit_are_refused(tmp_path, images, count, shares, says):
    files = [write(tmp_path, name) for name in "AB"[:count]]
    with pytest.raises(ConfigError, match=says):
        average_weights(files, shares, images)


def test_command_writes_weights_that_say_what_they_are(tmp_path, capfd, caplog):
    classes = tuple(load_class_list("tiny-imagenet-200"))
    recipe = load_recipe("tiny_imagenet_short").model_dump(mode="json") | {"image_size": 16, "holdout": 2}
    about = {"classes": classes, "recipe": recipe, "training": {"images": 4}}
    files = [write(tmp_path, "A", 1, **about), write(tmp_path, "B", 2, **about)]
    generator = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "photos" / classes[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    data = str(tmp_path / "photos")
    arguments = [*map(str, files), "--data", data, "--out", str(tmp_path / "out"), "--name", "MEAN", "--note", "why"]
    assert run(["average", *arguments, "--share", "1", "--share", "3", "--evaluate-on", data]) == 0
    path = tmp_path / "out" / "tiny-mean.safetensors"
    assert str(path) in capfd.readouterr().err
    _, metadata = read_weights(path)
    assert metadata.name == "MEAN" and metadata.training["note"] == "why" and metadata.training["statistics_images"] == 4
    assert [(accuracy.dataset, accuracy.n) for accuracy in metadata.accuracy] == [(HELD_OUT, 2), ("photos", 6)]
    source = open_dataset(data)
    rest, held_out = TrainingSet(*load_training_images(source, classes, 16)).split(2, recipe["seed"])
    assert metadata.accuracy[0].dataset_sha256 == held_out.sha256() and metadata.training["held_out_unseen"]
    # Statistics are of the others alone.
    network = build_network("tiny", 200)
    fit_weights(network, read_weights(path)[0], str(path))
    features = network[0](rest.images / 255)
    torch.testing.assert_close(network[1].running_mean, features.mean((0, 2, 3)), rtol=0.02, atol=1e-3)
    assert [part["share"] for part in metadata.training["averaged"]] == [0.25, 0.75]
    assert metadata.training["environment"]["lrrobust"]
    # The two say of no weights that they came from, but both are of one training, left at two epochs.
    assert "networks that did not come one from the other" not in caplog.text
    other_seed = {"training": about["training"] | {"seed": 9}}
    stranger = write(tmp_path, "S", 3, **about | other_seed)
    assert run(["average", str(stranger), *arguments[1:], "--name", "DOUBTED"]) == 0
    assert "networks that did not come one from the other" in caplog.text
    # The mean is no longer what it was made of, where it takes its place.
    kept = path.read_bytes()
    assert run(["average", str(path), *arguments[1:]]) == 2
    assert f"the mean would replace {path}, which it is made of" in capfd.readouterr().err and path.read_bytes() == kept
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert run(["average", *arguments, "--share", "1"]) == 2
    assert "--share: expected a number above 0 for each of the 2 files, found 1" in capfd.readouterr().err
    assert run(["average", *arguments, "--name", "a/b"]) == 2
    assert "--name must be letters" in capfd.readouterr().err
    # Others than those of the training: what was held out there would be looked at here.
    Image.new("RGB", (16, 16)).save(folder / "another.png")
    assert run(["average", *arguments]) == 2
    assert (
        "expected the 6 images that" in (err := capfd.readouterr().err)
        and "found 7: give the same as to `lrrobust train`" in err
    )
    unknown = [str(write(tmp_path, name, classes=classes)) for name in "CD"]
    assert run(["average", *unknown, "--data", data]) == 2
    assert "the recipe in" in (err := capfd.readouterr().err) and "D.safetensors: expected also description" in err
    # As many, but others.
    told = [str(write(tmp_path, name, **about | {"training": {"images": 5, "images_sha256": "ab"}})) for name in "EF"]
    assert run(["average", *told, "--data", data]) == 2
    assert "found 7 others" in capfd.readouterr().err
    nameless = [str(write(tmp_path, name, **about | {"training": {}})) for name in "GH"]
    assert run(["average", *nameless, "--data", data]) == 2
    assert "does not say of how many images it was trained" in capfd.readouterr().err
    # Another split was held out of one of the trainings.
    other = str(write(tmp_path, "I", **about | {"recipe": recipe | {"seed": 1}, "training": {"images": 5}}))
    last = str(write(tmp_path, "J", **about | {"training": {"images": 5}}))
    assert run(["average", other, last, "--data", data, "--out", str(tmp_path / "out"), "--name", "SEEN"]) == 0
    assert "that SEEN went on from may have seen them" in caplog.text
    assert read_metadata(tmp_path / "out" / "tiny-seen.safetensors").accuracy == ()
