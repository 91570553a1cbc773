"""Names to networks, and names to classifiers ready to be evaluated.

A name is one of these:

    lr_resnet50             one of ours, with the weights shipped in the package
    vgg16, torchvision:NAME a torchvision model; its weights are downloaded by torchvision
    timm:NAME               a timm model, of the optional extra; its weights are downloaded by timm
    path/to/file.py:factory your own: a function without arguments that returns a `Classifier`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lrrobust.errors import ModelError, UnknownNameError, WeightsError
from lrrobust.models import lrnet, resnet
from lrrobust.models.classifier import Classifier
from lrrobust.models.layer_code import files_of_layers
from lrrobust.models.residual import DEFAULT_STEM, STEMS, Normalization, Stem
from lrrobust.models.weights import SHIPPED_WEIGHTS, TRAINED_FOLDER, file_sha256, fit_weights, read_weights
from lrrobust.torchvision_import import import_torchvision
from lrrobust.user_file import run_user_file

#: Our own networks: name -> builder(num_classes, stem).
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "lr_resnet26": lrnet.lr_resnet26,
    "lr_resnet50": lrnet.lr_resnet50,
    "lr_resnet101": lrnet.lr_resnet101,
    "resnet26": resnet.resnet26,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
}

#: `--weights none`: random weights, to try things out.
NO_WEIGHTS = "none"

#: `--weights DEFAULT`: those that a model has when none are asked for, as torchvision says it.
OWN_WEIGHTS = "DEFAULT"

#: Image size of a network whose weights do not state one.
DEFAULT_INPUT_SIZE = 224


def build_network(name: str, num_classes: int, stem: Stem = DEFAULT_STEM) -> nn.Module:
    """One of our networks with fresh weights; UnknownNameError names the nearest."""
    if stem not in STEMS:
        raise UnknownNameError("stem", stem, STEMS)
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    return NETWORKS[name](num_classes, stem=stem)


def load_classifier(
    name: str,
    *,
    weights: str | None = None,
    classes: Sequence[str] | None = None,
    input_size: int | None = None,
    imagenet_classes: Sequence[str],
) -> Classifier:
    """The model that a name stands for, see the head of this module.

    Args:
        name: of the model.
        weights: None or "DEFAULT" for the model's own; "none" for random ones; the path of a safetensors file or
            checkpoint; or a name, such as IMAGENET1K_V2 of torchvision.
        classes: class list, for weights that do not carry one.
        input_size: side of the images in pixels, instead of what the weights state.
        imagenet_classes: the 1000 WordNet ids in label order, what torchvision and timm weights mean.

    Raises:
        UnknownNameError: no such model; the message names the nearest.
        ModelError: the model cannot be built, or needs a class list.
        WeightsError: its weights cannot be had, read, or fitted.
    """
    # The name by which torchvision calls a model's own, where several models need a word in its place.
    if weights == OWN_WEIGHTS:
        weights = None
    if name.endswith(".py"):
        raise ModelError(f"{name} names no function: add the factory, as in {name}:build")
    if ".py:" in name:
        classifier = _load_user_model(name, weights, classes, input_size)
    elif name in NETWORKS:
        classifier = _load_own(name, weights, classes, input_size)
    elif name.startswith("timm:"):
        classifier = _load_timm(name.removeprefix("timm:"), weights, classes, imagenet_classes)
    else:
        classifier = _load_torchvision(name.removeprefix("torchvision:"), weights, classes, imagenet_classes)
    if classes is not None and tuple(classes) != classifier.classes:
        raise ModelError(f"--classes differs from the class list that {name} brings along: leave it out")
    return classifier if input_size is None else replace(classifier, input_size=input_size, resize_size=None)


# --- ours --------------------------------------------------------------------------------------------


def _load_own(name: str, weights: str | None, classes: Sequence[str] | None, input_size: int | None) -> Classifier:
    if weights == NO_WEIGHTS:
        known = tuple(_need(classes, name))
        return Classifier(build_network(name, len(known)), known, DEFAULT_INPUT_SIZE, 256, weights="random")
    shipped = SHIPPED_WEIGHTS.get(name, {})
    is_shipped = weights is None or weights in shipped
    path = _shipped_path(name, weights) if is_shipped else Path(weights)
    if not is_shipped and not path.is_file():
        known = [*shipped, *([OWN_WEIGHTS] if shipped else []), NO_WEIGHTS]
        raise UnknownNameError(f"weights of {name} (nor is there such a file)", str(weights), known)
    state, metadata = read_weights(path)
    if metadata is None:
        known = _need(classes, f"{name} with {path.name}, which carries no class list,")
        if input_size is None:
            raise ModelError(f"{path.name} does not state the size of its images: add --input-size, as in --input-size 64")
        network, size, resize, interpolation = build_network(name, len(known)), input_size, None, "bilinear"
        label, recipe, followed = path.name, "", ""
    else:
        if metadata.model != name:
            raise WeightsError(f"{path} holds weights of {metadata.model}, not of {name}: use --model {metadata.model}")
        known, label = metadata.classes, metadata.name
        recipe, followed = metadata.recipe_identity, metadata.followed
        network = build_network(name, len(known), metadata.stem)
        size, resize, interpolation = metadata.input_size, metadata.resize_size, metadata.interpolation
    fit_weights(network, state, str(path))
    # On the CPU and on tensor cores convolutions run faster with channels innermost.
    network = network.to(memory_format=torch.channels_last)
    return Classifier(network, tuple(known), size, resize, interpolation, weights=label, recipe=recipe, followed=followed)


def _shipped_path(name: str, weights: str | None) -> Path:
    if name not in SHIPPED_WEIGHTS:
        trained = ", ".join(sorted(SHIPPED_WEIGHTS)) or "none yet"
        raise WeightsError(
            f"no weights of {name} come with this package (there are: {trained}): "
            "give --weights FILE, or --weights none for random ones"
        )
    available = SHIPPED_WEIGHTS[name]
    shipped = available[weights] if weights is not None else next(iter(available.values()))
    path = TRAINED_FOLDER / shipped.file
    if not path.is_file():
        raise WeightsError(f"{path} is missing from the installation: install lrrobust again")
    if file_sha256(path) != shipped.sha256:
        raise WeightsError(f"{path} is not the file this version was released with: install lrrobust again")
    return path


def _need(classes: Sequence[str] | None, what: str) -> Sequence[str]:
    if classes is None:
        raise ModelError(
            f"{what} needs a class list: add --classes tiny-imagenet-200, imagenet-1k, cifar-10, cifar-100, or a text file "
            "with one class a line"
        )
    return classes


def name_classes(classes: Sequence[str], imagenet_classes: Sequence[str]) -> list[str]:
    """What people call each class: torchvision's name of a WordNet id of ImageNet, else the class itself.

    >>> name_classes(["n01443537", "ant"], imagenet_classes=["n01440764", "n01443537"])
    ['goldfish', 'ant']
    """
    import_torchvision()
    from torchvision import models

    names = dict(zip(imagenet_classes, models.ResNet50_Weights.DEFAULT.meta["categories"]))
    return [names.get(name, name) for name in classes]


# --- other people's ----------------------------------------------------------------------------------


def _load_torchvision(
    name: str, weights: str | None, classes: Sequence[str] | None, imagenet_classes: Sequence[str]
) -> Classifier:
    import_torchvision()
    from torchvision import models

    if name not in models.list_models(module=models):
        if ":" in name:
            raise ModelError(f"unknown model {name!r}: expected path/to/file.py:factory, timm:NAME or torchvision:NAME")
        if Path(name).suffix in (".safetensors", ".pt", ".pth"):
            raise ModelError(
                f"unknown model {name!r}: weights are given with --weights, the network that they fit with --model"
            )
        known = [*NETWORKS, *models.list_models(module=models)]
        raise UnknownNameError("model", name, known, "timm:NAME, or path/to/file.py:factory for your own")
    is_given = weights is not None and (weights == NO_WEIGHTS or Path(weights).is_file())
    try:
        chosen = models.get_model_weights(name)["DEFAULT" if is_given else weights or "DEFAULT"]
    except KeyError:
        known_names = [entry.name for entry in models.get_model_weights(name)]
        raise UnknownNameError(f"weights of {name} (nor is there such a file)", str(weights), known_names) from None
    if is_given:
        known = _classes_of_foreign(name, weights, classes, imagenet_classes)
        module = models.get_model(name, weights=None, num_classes=len(known))
        label = _fill(module, weights)
    else:
        known, label = imagenet_classes, f"torchvision {chosen.name}"
        module = _download(name, lambda: models.get_model(name, weights=chosen))
    preset = chosen.transforms()
    return Classifier(
        _Normalized(module, preset.mean, preset.std),
        tuple(known),
        preset.crop_size[0],
        preset.resize_size[0],
        _known_interpolation(preset.interpolation.value),
        weights=label,
    )


def _load_timm(name: str, weights: str | None, classes: Sequence[str] | None, imagenet_classes: Sequence[str]) -> Classifier:
    import_torchvision()
    try:
        import timm
    except ImportError:
        raise ModelError(f"timm:{name} needs the package timm: pip install timm") from None
    if name.split(".")[0] not in timm.list_models():
        raise UnknownNameError("timm model", name, timm.list_models())
    pretrained = weights is None
    known = imagenet_classes if pretrained else _classes_of_foreign(f"timm:{name}", weights, classes, imagenet_classes)
    options = {} if pretrained else {"num_classes": len(known)}
    module = _download(name, lambda: timm.create_model(name, pretrained=pretrained, **options))
    if module.num_classes != len(known):
        raise ModelError(
            f"timm:{name} has {module.num_classes} classes, expected the {len(known)} of ImageNet-1k: "
            "choose weights fine-tuned on it, or wrap the model in a file.py:factory with its class list"
        )
    label = f"timm {module.pretrained_cfg.get('tag') or 'default'}" if pretrained else _fill(module, weights)
    config = timm.data.resolve_model_data_config(module)
    size = config["input_size"][-1]
    return Classifier(
        _Normalized(module, config["mean"], config["std"]),
        tuple(known),
        size,
        max(size, round(size / config["crop_pct"])),
        _known_interpolation(config["interpolation"]),
        weights=label,
    )


def _classes_of_foreign(
    name: str, weights: str, classes: Sequence[str] | None, imagenet_classes: Sequence[str]
) -> Sequence[str]:
    """The class list given; for random weights, which mean nothing, ImageNet's serves as well."""
    return imagenet_classes if classes is None and weights == NO_WEIGHTS else _need(classes, f"{name} with {weights}")


def _known_interpolation(name: str) -> Any:
    return name if name in ("bilinear", "bicubic") else "bicubic"


class _Normalized(nn.Module):
    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalization = Normalization(mean, std)
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalization(images))


def _fill(module: nn.Module, weights: str) -> str:
    """Loads a file of weights, unless random ones were asked for; what to call them."""
    if weights == NO_WEIGHTS:
        return "random"
    state, _ = read_weights(Path(weights))
    fit_weights(module, state, weights)
    return Path(weights).name


def _download(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # the network fails in as many types as there are libraries
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the weights of {name} could not be downloaded or loaded ({type(error).__name__}: {reason}): "
            "connect to the network, or give --weights FILE or --weights none"
        ) from None


# --- the user's --------------------------------------------------------------------------------------


def _load_user_model(name: str, weights: str | None, classes: Sequence[str] | None, input_size: int | None) -> Classifier:
    """Runs the user's own file."""
    file, factory_name = name.rsplit(":", 1)

    def build(module: ModuleType) -> tuple[Any, tuple[Path, ...]]:
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            raise ModelError(f"{file} has no function {factory_name!r}: expected a factory that returns a Classifier")
        made = factory()
        network = made.module if isinstance(made, Classifier) else made
        # While their modules are still known.
        return made, files_of_layers(network, Path(file).absolute().parent) if isinstance(network, nn.Module) else ()

    made, files = run_user_file(file, "--model expects path/to/file.py:factory", build, ModelError)
    if isinstance(made, nn.Module) and classes is not None:
        size = getattr(made, "input_size", None) if input_size is None else input_size
        if size is None:
            # Most networks take any size, and do worse than they can at another than they were trained at.
            raise ModelError(
                f"{name} returned a {type(made).__name__} that does not state the size of its images: add --input-size, as in "
                "--input-size 224, or return a lrrobust.models.Classifier"
            )
        made = Classifier(made, tuple(classes), size)
    if not isinstance(made, Classifier):
        raise ModelError(
            f"{name} returned {type(made).__name__}: expected a lrrobust.models.Classifier, "
            "or a torch.nn.Module together with --classes"
        )
    made = replace(made, files=files)
    if weights is None:
        return made
    if weights == NO_WEIGHTS:
        raise ModelError(
            f"{name} brings its own weights, {weights!r} is for networks known by name: "
            f"leave --weights out, or give {OWN_WEIGHTS}"
        )
    # By which recipe the model's own weights were trained says nothing of these.
    return replace(made, weights=_fill(made.module, weights), recipe="", followed="")
