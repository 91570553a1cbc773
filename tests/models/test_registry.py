import os
import re
import sys
import types
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from lrrobust.data.class_lists import IMAGENET_1K, TINY_IMAGENET_200
from lrrobust.errors import ModelError, UnknownNameError, WeightsError
from lrrobust.models import Classifier, build_network, load_classifier, name_classes, registry
from lrrobust.models.residual import IMAGENET_MEAN, IMAGENET_STD
from lrrobust.models.weights import ShippedWeights, WeightsMetadata, file_sha256, quantise, save_weights
from lrrobust.torchvision_import import import_torchvision

CLASSES = ("cat", "dog", "fly")


def load(name, **options):
    return load_classifier(name, imagenet_classes=IMAGENET_1K, **options)


def write_weights(path, model="tiny", build=None):
    network = build(len(CLASSES))
    metadata = WeightsMetadata(
        name="TEST_V1",
        model=model,
        description="made for a test",
        classes=CLASSES,
        input_size=48,
        resize_size=52,
        interpolation="bicubic",
        recipe={},
        training={},
        accuracy=(),
    )
    save_weights(path, quantise(network.state_dict()), metadata)
    return network


# --- ours --------------------------------------------------------------------------------------------


def test_names_of_our_networks():
    assert set(registry.NETWORKS) == {"lr_resnet26", "lr_resnet50", "lr_resnet101", "resnet26", "resnet50", "resnet101"}
    for name, build in registry.NETWORKS.items():
        assert build.__name__ == name
        with torch.device("meta"):
            network = build_network(name, 7)
        assert network.classifier.out_features == 7


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: build_network("lr_resnet5", 10), "unknown network 'lr_resnet5': did you mean lr_resnet50"),
        (lambda: load("lr_resnt50"), "unknown model 'lr_resnt50': did you mean lr_resnet50"),
        (lambda: load("vgg61"), "unknown model 'vgg61': did you mean .*vgg16"),
        (lambda: load("torchvision:vgg61"), "unknown model 'vgg61': did you mean .*vgg16"),
        (
            lambda: load("zzzzzz"),
            "unknown model 'zzzzzz': known: .*lr_resnet26.*; or give timm:NAME, or path/to/file.py:factory",
        ),
        (lambda: load("VGG16"), "unknown model 'VGG16': did you mean vgg16"),
        # Models of torchvision for other tasks are no classifiers.
        (lambda: load("fcn_resnet50"), "unknown model 'fcn_resnet50'"),
    ],
)
def test_unknown_names_get_suggestions(build, message):
    with pytest.raises(UnknownNameError, match=message):
        build()


def test_our_weights_bring_everything_along(tmp_path, tiny_networks, seeded):
    path = tmp_path / "weights.safetensors"
    network = write_weights(path, build=tiny_networks).eval()
    classifier = load("tiny", weights=str(path))
    assert (classifier.classes, classifier.input_size, classifier.resize_size) == (CLASSES, 48, 52)
    assert (classifier.interpolation, classifier.weights) == ("bicubic", "TEST_V1")
    images = torch.rand(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(classifier.module.eval()(images), network(images), rtol=0, atol=0.02)


def test_weights_of_another_model(tmp_path, tiny_networks):
    path = tmp_path / "weights.safetensors"
    write_weights(path, build=tiny_networks)
    with pytest.raises(WeightsError, match="weights.safetensors holds weights of tiny, not of other_tiny: use --model tiny$"):
        load("other_tiny", weights=str(path))


def test_checkpoint_without_classes(tmp_path, tiny_networks, seeded):
    path = tmp_path / "checkpoint.pt"
    network = tiny_networks(3)
    torch.save({"state_dict": network.state_dict()}, path)
    with pytest.raises(
        ModelError, match="tiny with checkpoint.pt, which carries no class list, needs a class list: add --classes"
    ):
        load("tiny", weights=str(path))
    with pytest.raises(ModelError, match="checkpoint.pt does not state the size of its images: add --input-size"):
        load("tiny", weights=str(path), classes=CLASSES)
    classifier = load("tiny", weights=str(path), classes=CLASSES, input_size=48)
    assert (classifier.classes, classifier.weights) == (CLASSES, "checkpoint.pt")
    assert (classifier.input_size, classifier.resize_size) == (48, None)
    torch.testing.assert_close(dict(classifier.module.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    with pytest.raises(
        WeightsError, match=r"checkpoint.pt does not fit the network: 7.weight is \(3, 32\), the network has \(2, 32\)"
    ):
        load("tiny", weights=str(path), classes=CLASSES[:2], input_size=48)


def test_random_weights_need_classes(tiny_networks):
    with pytest.raises(
        ModelError,
        match="tiny needs a class list: add --classes tiny-imagenet-200, imagenet-1k, cifar-10, cifar-100, or a text file",
    ):
        load("tiny", weights="none")
    classifier = load("tiny", weights="none", classes=CLASSES)
    assert (classifier.classes, classifier.weights) == (CLASSES, "random")


def test_weights_that_are_not_there(tmp_path, tiny_networks, monkeypatch):
    with pytest.raises(UnknownNameError, match="nor is there such a file.*none.pt"):
        load("tiny", weights=str(tmp_path / "none.pt"))
    with pytest.raises(WeightsError, match=r"no weights of tiny come with this package .*--weights FILE, or --weights none"):
        load("tiny")
    monkeypatch.setattr(registry, "SHIPPED_WEIGHTS", {"other_tiny": {"V1": ShippedWeights("a", "b")}})
    with pytest.raises(WeightsError, match=r"no weights of tiny come with this package \(there are: other_tiny\)"):
        load("tiny")


def test_shipped_weights_are_checked_before_use(tmp_path, tiny_networks, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    monkeypatch.setattr(registry, "TRAINED_FOLDER", tmp_path)
    monkeypatch.setattr(registry, "SHIPPED_WEIGHTS", {"tiny": {"TEST_V1": ShippedWeights(path.name, "0" * 64)}})
    with pytest.raises(WeightsError, match="tiny.safetensors is missing from the installation: install lrrobust again"):
        load("tiny")
    write_weights(path, build=tiny_networks)
    with pytest.raises(WeightsError, match="tiny.safetensors is not the file this version was released with"):
        load("tiny")
    monkeypatch.setattr(registry, "SHIPPED_WEIGHTS", {"tiny": {"TEST_V1": ShippedWeights(path.name, file_sha256(path))}})
    assert load("tiny").weights == "TEST_V1"
    assert load("tiny", weights="TEST_V1").weights == "TEST_V1"
    with pytest.raises(UnknownNameError, match="TEST_V2.*TEST_V1"):
        load("tiny", weights="TEST_V2")


# --- torchvision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:squeezenet1_1"])
def test_torchvision_model_with_random_weights(name, seeded):
    classifier = load(name, weights="none")
    assert (classifier.classes, classifier.weights, classifier.input_size) == (IMAGENET_1K, "random", 224)
    images = torch.rand(2, 3, 64, 64)
    module = classifier.module.eval()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        logits = module(images)
        torch.testing.assert_close(logits, module.network((images - mean) / std))
    assert logits.shape == (2, 1000)


def test_torchvision_model_with_own_classes_and_checkpoint(tmp_path, seeded):
    network = load("squeezenet1_1", weights="none", classes=CLASSES).module.network
    path = tmp_path / "mine.pt"
    torch.save(network.state_dict(), path)
    classifier = load("squeezenet1_1", weights=str(path), classes=CLASSES)
    assert (classifier.classes, classifier.weights) == (CLASSES, "mine.pt")
    torch.testing.assert_close(dict(classifier.module.network.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    with pytest.raises(WeightsError, match="mine.pt does not fit the network"):
        load("squeezenet1_1", weights=str(path), classes=IMAGENET_1K)
    with pytest.raises(ModelError, match="squeezenet1_1 with .*mine.pt needs a class list"):
        load("squeezenet1_1", weights=str(path))


@pytest.fixture
def torchvision_models():
    import_torchvision()
    from torchvision import models

    return models


def test_torchvision_weights_without_network(torchvision_models, monkeypatch):
    def fail(*_, **__):
        raise URLError(OSError("Temporary failure\nin name resolution"))

    monkeypatch.setattr(torchvision_models, "get_model", fail)
    with pytest.raises(
        WeightsError, match=r"^the weights of vgg16 could not be downloaded or loaded \(URLError: [^\n]*\): connect [^\n]*$"
    ):
        load("vgg16")


def test_unknown_torchvision_weights():
    with pytest.raises(
        UnknownNameError, match=r"weights of resnet50 \(nor is there such a file\) 'IMAGENET1K_V3': did you mean"
    ):
        load("torchvision:resnet50", weights="IMAGENET1K_V3")


def test_every_torchvision_model_has_a_preprocessing_we_can_follow(torchvision_models, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision_models, "get_model", lambda name, weights: asked.append((name, weights)) or nn.Identity())
    for name in torchvision_models.list_models(module=torchvision_models):
        for weights in torchvision_models.get_model_weights(name):
            classifier = load(f"torchvision:{name}", weights=weights.name)
            assert asked[-1] == (name, weights)
            assert classifier.weights == f"torchvision {weights.name}"
            assert classifier.input_size == weights.transforms().crop_size[0] <= classifier.resize_size
    assert len(asked) > 80
    load("torchvision:resnet50")
    assert asked[-1][1].name == "IMAGENET1K_V2"


# --- timm --------------------------------------------------------------------------------------------


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm:vit_tiny needs the package timm: pip install timm"):
        load("timm:vit_tiny")


class _TimmModel(nn.Conv2d):
    pretrained_cfg = {"tag": "augreg_in1k"}


@pytest.fixture
def fake_timm(monkeypatch):
    timm = types.ModuleType("timm")
    timm.created = []

    def create_model(name, pretrained, num_classes=None):
        timm.created.append((name, pretrained, num_classes))
        own = 21841 if "in22k" in name else 1000
        model = _TimmModel(3, num_classes or own, 1)
        model.num_classes = num_classes or own
        return model

    timm.create_model = create_model
    timm.list_models = lambda: ["vit_tiny", "beit_base"]
    config = {"input_size": (3, 96, 96), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda _: config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    return timm


def test_timm_model(fake_timm):
    classifier = load("timm:vit_tiny.augreg_in1k")
    assert fake_timm.created == [("vit_tiny.augreg_in1k", True, None)]
    assert (classifier.classes, classifier.weights) == (IMAGENET_1K, "timm augreg_in1k")
    assert (classifier.input_size, classifier.resize_size, classifier.interpolation) == (96, 107, "bicubic")
    images = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(classifier.module(images), classifier.module.network((images - 0.5) / 0.25))


def test_timm_weights_of_another_label_space_are_refused(fake_timm):
    with pytest.raises(ModelError, match="has 21841 classes, expected the 1000 of ImageNet-1k"):
        load("timm:beit_base.in22k")


def test_timm_model_with_own_weights(fake_timm, tmp_path):
    assert load("timm:vit_tiny", weights="none", classes=CLASSES).weights == "random"
    assert fake_timm.created == [("vit_tiny", False, 3)]
    path = tmp_path / "mine.pt"
    torch.save(_TimmModel(3, 3, 1).state_dict(), path)
    assert load("timm:vit_tiny", weights=str(path), classes=CLASSES).weights == "mine.pt"


def test_unknown_timm_model_and_failed_download(fake_timm):
    with pytest.raises(UnknownNameError, match="unknown timm model 'vit_tinny': did you mean vit_tiny"):
        load("timm:vit_tinny")

    def fail(*_, **__):
        raise RuntimeError("no route to host")

    fake_timm.create_model = fail
    with pytest.raises(WeightsError, match=r"the weights of vit_tiny could not be .*RuntimeError: no route to host"):
        load("timm:vit_tiny")


# --- the user's --------------------------------------------------------------------------------------

GOOD = """
from __future__ import annotations
from dataclasses import dataclass
import helper_of_the_user
from lrrobust.models import Classifier
from torch import nn

@dataclass
class Options:
    size: int = helper_of_the_user.SIZE

def build():
    return Classifier(nn.Linear(2, 2), ("cat", "dog"), Options().size, weights="my own")

def bare():
    module = nn.Linear(2, 2)
    module.input_size = 20
    return module

not_a_function = 3

def wrong():
    return {"model": 1}

def fails():
    numbers = []
    return numbers[3]

def ends():
    import sys
    sys.exit(0)

def fails_in_two_lines():
    raise ValueError("first\\nsecond")

def of_any_size():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "helper_of_the_user.py").write_text("SIZE = 40\n")
    path = tmp_path / "my_model.py"
    path.write_text(GOOD)
    yield path
    for name in ("helper_of_the_user", "lrrobust_user_my_model"):
        sys.modules.pop(name, None)


def test_user_factory(user_file):
    before = list(sys.path)
    classifier = load(f"{user_file}:build")
    assert isinstance(classifier, Classifier) and classifier.input_size == 40 and classifier.weights == "my own"
    assert sys.path == before


@pytest.mark.parametrize("line, expected", [("sys.path.insert(0, '/mine')", 0), ("sys.path.append('/mine')", -1)])
def test_what_a_user_file_adds_to_the_search_path_stays(user_file, monkeypatch, line, expected):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = list(sys.path)
    user_file.write_text(f"import sys\n{line}\n" + GOOD.replace("from __future__ import annotations", ""))
    load(f"{user_file}:build")
    assert sys.path[expected] == "/mine"
    assert [entry for entry in sys.path if entry != "/mine"] == before


@pytest.mark.parametrize("line", ["os.chdir('/')", "sys.path.clear()", "sys.path = []"])
def test_what_a_user_file_does_to_the_process_harms_nobody(user_file, monkeypatch, line):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(user_file.parent)
    user_file.write_text(GOOD.replace("def build():", f"def build():\n    import os, sys\n    {line}"))
    assert load("my_model.py:build").input_size == 40
    assert os.getcwd() == str(user_file.parent)


def test_torchvision_is_mended_before_a_user_file_imports_it(user_file, monkeypatch):
    called = []
    monkeypatch.setattr("lrrobust.user_file.import_torchvision", lambda: called.append(1))
    user_file.write_text(GOOD)
    load(f"{user_file}:build")
    assert called


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take no such names")
def test_a_user_file_may_lie_below_any_name(user_file, monkeypatch):
    folder = user_file.parent / "caf\udce9"
    folder.mkdir()
    for path in (user_file, user_file.with_name("helper_of_the_user.py")):
        path.rename(folder / path.name)
    monkeypatch.chdir(folder)
    assert load("my_model.py:build").input_size == 40


def test_user_module_with_classes(user_file):
    classifier = load(f"{user_file}:bare", classes=CLASSES[:2])
    assert (classifier.classes, classifier.input_size) == (CLASSES[:2], 20)
    with pytest.raises(
        ModelError,
        match="bare returned Linear: expected a lrrobust.models.Classifier, or a torch.nn.Module together with --classes",
    ):
        load(f"{user_file}:bare")
    # At another size than it was trained at it would seem worse than it is.
    with pytest.raises(ModelError, match="returned a Linear that does not state the size of its images: add --input-size"):
        load(f"{user_file}:of_any_size", classes=CLASSES[:2])
    assert load(f"{user_file}:of_any_size", classes=CLASSES[:2], input_size=32).input_size == 32
    assert load(f"{user_file}:bare", classes=CLASSES[:2], input_size=32).input_size == 32


def test_two_models_with_helpers_of_one_name_do_not_mix(tmp_path):
    for folder, size in (("a", 8), ("b", 16)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_the_user.py").write_text(f"SIZE = {size}\n")
        (tmp_path / folder / "model.py").write_text(GOOD)
    sizes = [load(f"{tmp_path / folder / 'model.py'}:build").input_size for folder in ("a", "b", "a")]
    assert sizes == [8, 16, 8]


LATE = """
import torch
from torch import nn
from lrrobust.models import Classifier

class Late(nn.Module):
    def forward(self, images):
        from late_helper import scale
        return scale * images.flatten(1)[:, :2]

def build():
    return Classifier(Late(), ("ant", "bee"), input_size=8)
"""


def test_a_model_may_import_what_lies_beside_it_while_it_is_called(tmp_path):
    for name, scale in (("one", 2), ("two", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(LATE)
        (tmp_path / name / "late_helper.py").write_text(f"scale = {scale}")
    # What others look for and do without is not found in a folder of that name.
    (tmp_path / "one" / "wandb").mkdir()
    images, path_before = torch.ones(1, 3, 8, 8), list(sys.path)
    one = load(f"{tmp_path}/one/model.py:build").module
    assert one(images).tolist() == [[2, 2]] and sys.path == path_before
    with pytest.raises(ImportError):
        import wandb  # noqa: F401
    del sys.modules["late_helper"]
    # Of two helpers of one name nobody knows which is meant.
    load(f"{tmp_path}/two/model.py:build")
    with pytest.raises(ModuleNotFoundError, match="late_helper"):
        one(images)


@pytest.mark.parametrize(
    "line", ["torch.set_default_device('meta')", "torch.set_float32_matmul_precision('medium')",
             "torch.autocast('cpu', dtype=torch.bfloat16).__enter__()"]
)  # fmt: skip
def test_what_a_user_file_asks_of_torch_ends_with_it(user_file, line):
    def asked():
        return torch.empty(0).device, torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")

    user_file.write_text(user_file.read_text() + "\nimport torch\n" + line)
    before = asked()
    load(f"{user_file}:build")
    assert asked() == before


def test_a_class_list_that_differs_is_refused(user_file):
    assert load(f"{user_file}:build", classes=("cat", "dog")).classes == ("cat", "dog")
    with pytest.raises(ModelError, match="--classes differs from the class list"):
        load(f"{user_file}:build", classes=("dog", "cat"))


def test_user_factory_with_weights(user_file, tmp_path):
    path = tmp_path / "mine.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert load(f"{user_file}:build", weights=str(path)).weights == "mine.pt"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(WeightsError, match="mine.pt does not fit the network"):
        load(f"{user_file}:build", weights=str(path))
    # For a place among several models, some of which need --weights.
    assert load(f"{user_file}:build", weights="DEFAULT").weights == load(f"{user_file}:build").weights
    with pytest.raises(ModelError, match="build brings its own weights.*leave --weights out, or give DEFAULT"):
        load(f"{user_file}:build", weights="none")


def test_a_colon_without_a_file_is_no_model():
    with pytest.raises(
        ModelError, match="unknown model 'model:build': expected path/to/file.py:factory, timm:NAME or torchvision:NAME"
    ):
        load("model:build")


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize(
    "factory, message",
    [
        ("missing", "my_model.py has no function 'missing': expected a factory that returns a Classifier"),
        ("not_a_function", "my_model.py has no function 'not_a_function'"),
        ("wrong", "my_model.py:wrong returned dict: expected a lrrobust.models.Classifier"),
        ("fails", "my_model.py, line 27 failed with IndexError: list index out of range"),
        ("fails_in_two_lines", "my_model.py, line 34 failed with ValueError: first second$"),
        ("ends", "my_model.py, line 31 failed with SystemExit: 0"),
    ],
)
def test_user_mistakes(user_file, monkeypatch, factory, message, is_relative):
    monkeypatch.chdir(user_file.parent)
    before = list(sys.path)
    path = user_file.name if is_relative else user_file
    with pytest.raises(ModelError, match=message):
        load(f"{path}:{factory}")
    assert sys.path == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("import no_such_package", "my_model.py, line 1 failed with ModuleNotFoundError: No module named 'no_such_package'"),
        ("def build(:", r"my_model.py failed with SyntaxError: invalid syntax \(my_model.py, line 1\)"),
        ("from lrrobust.errors import ModelError\nraise ModelError('said by the file')", "^said by the file$"),
    ],
)
def test_user_file_that_does_not_load(user_file, text, message):
    user_file.write_text(text)
    with pytest.raises(ModelError, match=message):
        load(f"{user_file}:build")


def test_missing_user_file():
    with pytest.raises(ModelError, match=r"no file models/mine.py: --model expects path/to/file.py:factory"):
        load(f"{Path('models/mine.py')}:build")


def test_classes_have_the_names_people_use():
    names = name_classes(TINY_IMAGENET_200, IMAGENET_1K)
    assert len(set(names)) == 200 and not any(re.fullmatch(r"n\d{8}", name) for name in names)
    assert names[TINY_IMAGENET_200.index("n01443537")] == "goldfish"
    assert names[TINY_IMAGENET_200.index("n04146614")] == "school bus"
    assert name_classes(["ant", "n01443537"], IMAGENET_1K) == ["ant", "goldfish"]
