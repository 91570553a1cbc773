import pytest
import yaml

from lrrobust.data.class_lists import load_class_list
from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.training.recipe import RECIPES_FOLDER, Phase, load_recipe


def write(tmp_path, recipe, **changes):
    content = {**recipe.model_dump(mode="json"), **changes}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe == load_recipe(path)
    assert load_class_list(recipe.classes)
    # What is trained last is about what the weights are used at: random crops show things larger than they are.
    assert 0.75 * recipe.image_size <= recipe.phases[-1].size <= recipe.image_size


def test_some_recipe_is_shipped():
    assert "tiny_imagenet_short" in {path.stem for path in RECIPES_FOLDER.glob("*.yaml")}


def test_own_file(tmp_path, recipe):
    assert load_recipe(write(tmp_path, recipe)) == recipe
    assert load_recipe(str(write(tmp_path, recipe, description="another"))).description == "another"


def test_precision_replaces_that_of_the_recipe():
    own = load_recipe("tiny_imagenet_short")
    assert own.precision == "bf16"
    assert load_recipe("tiny_imagenet_short", "float32") == own.model_copy(update={"precision": "float32"})
    with pytest.raises(ConfigError, match="^--precision: precision: expected 'float32' or 'bf16', found 'fp16'"):
        load_recipe("tiny_imagenet_short", "fp16")


def test_what_yaml_takes_for_a_date_is_text(tmp_path, recipe):
    path = write(tmp_path, recipe)
    path.write_text(path.read_text().replace("two short epochs", "2024-05-01"))
    assert load_recipe(path).description == "2024-05-01"


def test_phases(recipe):
    longer = recipe.model_copy(
        update={"phases": (Phase(epochs=2, size=16), Phase(epochs=1, size=20), Phase(epochs=2, size=24))}
    )
    assert longer.epochs == 5
    assert [longer.size_of_epoch(epoch) for epoch in range(5)] == [16, 16, 20, 24, 24]
    with pytest.raises(ValueError, match="the recipe colours has 5 epochs, there is no epoch 6"):
        longer.size_of_epoch(6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": None}, "expected also learning_rate, found only "),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, found 0.0"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, found 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate: .*, found nan"),
        ({"leaning_rate": 0.1}, "leaning_rate: unknown key, did you mean learning_rate?"),
        ({"name": "My Recipe"}, r"name: expected text that matches .*, found 'My Recipe'"),
        ({"batch_size": 1}, "batch_size: expected at least 2, found 1"),
        ({"batch_size": 8.5}, "batch_size: expected a whole number, found 8.5"),
        ({"image_size": 8}, "image_size: expected at least 16"),
        ({"phases": []}, r"phases: expected a longer list, found \[\]"),
        ({"phases": [{"epochs": 0, "size": 16}]}, "phases.0.epochs: expected at least 1, found 0"),
        ({"phases": [{"epochs": 1, "size": 16}, {"epochs": 1}]}, "expected also phases.1.size, found only "),
        ({"phases": [{"epochs": 1, "size": 2048}]}, "phases.0.size: expected at most 1024"),
        ({"optimizer": "adam"}, "optimizer: expected 'adamw', 'muon' or 'sgd', found 'adam'"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0"),
        ({"gradient_clip": 0}, "gradient_clip: expected more than 0"),
        ({"warmup": 1.0}, "warmup: expected less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected at least 0"),
        ({"ema_decay": 1}, "ema_decay: expected less than 1"),
        ({"crop_scale_min": 0}, "crop_scale_min: expected more than 0"),
        ({"crop_scale_min": 1.5}, "crop_scale_min: expected at most 1"),
        ({"horizontal_flip": "yes please"}, "horizontal_flip: expected true or false, found 'yes please'"),
        ({"precision": "fp16"}, "precision: expected 'float32' or 'bf16', found 'fp16'"),
        ({"holdout": -1}, "holdout: expected at least 0"),
        ({"seed": True}, "seed: expected a whole number, found True"),
    ],
)
def test_bad_values_name_file_and_key(tmp_path, recipe, change, message):
    path = write(tmp_path, recipe)
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        load_recipe(write(tmp_path, recipe, **change))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"name: [unclosed", r"mine.yaml: expected YAML, found [^\n]*$"),
        (b"\xff\xfe\xfa", r"mine.yaml: expected UTF-8 text, found byte 0xff"),
        (b"- a\n- b\n", r"mine.yaml: expected keys and values, .* found \["),
        (b"", "mine.yaml: expected keys and values, .* an empty file"),
        (b"2024-05-01: x\n", "mine.yaml: expected YAML, found keys must be plain words"),
        (b"!!python/object/apply:os.system ['true']", "mine.yaml: expected YAML, found could not determine"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_unknown_recipe():
    with pytest.raises(UnknownNameError, match="unknown recipe 'tiny_imagenet_shrt': did you mean tiny_imagenet_short"):
        load_recipe("tiny_imagenet_shrt")
