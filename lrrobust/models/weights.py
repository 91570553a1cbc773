"""Files of trained weights: what is in them, how they are written and read.

One safetensors file holds the tensors and, in its header, everything needed to use and to judge them
(`WeightsMetadata`). Matrices and kernels are stored as int8 with one float32 scale per output channel,
which quarters the file; they come back as float32. Reading never runs code out of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.parameter import is_lazy

from lrrobust.errors import ModelError, WeightsError
from lrrobust.models.residual import DEFAULT_STEM, Stem
from lrrobust.tensor_file import load_tensors

_SCALE_SUFFIX = ".int8_scale"
_METADATA_KEY = "lrrobust"
#: Smaller tensors stay float32: they cost little and norms and biases are sensitive.
_MIN_QUANTISED_SIZE = 4096
#: At most this many differing keys are named when a checkpoint does not fit.
_NAMED_DIFFERENCES = 3

TRAINED_FOLDER = Path(__file__).parent / "trained"


@dataclass(frozen=True)
class ShippedWeights:
    """A file in `TRAINED_FOLDER`, and the sha256 it was released with."""

    file: str
    sha256: str


#: Weights that come with the package: model -> name of the weights -> file; the first is the default.
SHIPPED_WEIGHTS: Mapping[str, Mapping[str, ShippedWeights]] = {
    "lr_resnet50": {
        "TINY_IMAGENET_V1": ShippedWeights(
            "lr_resnet50-tiny_imagenet_v1.safetensors",
            "b587e2fbb53b6228efffcd2fededc3d32174ca0da45f5cd085cc0361aff74504",
        ),
    },
    "resnet50": {
        "TINY_IMAGENET_V1": ShippedWeights(
            "resnet50-tiny_imagenet_v1.safetensors",
            "e27c62772ee4456ba2dcbd2b4aaf7fdaca85d88cf8876068c6c8d40ba7435ab3",
        ),
    },
}


class Accuracy(BaseModel):
    """Clean accuracy of the stored (quantised) weights on one set of images; fractions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    dataset_sha256: str
    n: int
    top1: float
    top5: float
    #: Before rounding to int8.
    top1_float32: float


class _InitialWeights(BaseModel):
    #: `WeightsMetadata.recipe_identity` and `stages` of these.
    recipe: str = ""
    stages: list[tuple[NonNegativeInt, NonNegativeInt]] = []


class _Averaged(BaseModel):
    name: str
    share: float
    recipe: str = ""


class _Training(BaseModel):
    """What code reads of how a training went; the rest is for people."""

    images: PositiveInt | None = None
    images_sha256: str | None = None
    epochs: NonNegativeInt = 0
    schedule_epochs: NonNegativeInt = 0
    initial_weights: _InitialWeights | None = None
    averaged: list[_Averaged] = []
    held_out_unseen: bool = False


class WeightsMetadata(BaseModel):
    """What a weights file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str
    model: str
    #: Of the network; files of before there was a choice do not say.
    stem: Stem = DEFAULT_STEM
    description: str
    #: Class names in label order; for ImageNet models WordNet ids.
    classes: tuple[str, ...]
    input_size: int
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    #: The training recipe as resolved, and how the training went.
    recipe: dict[str, Any]
    training: dict[str, Any]
    accuracy: tuple[Accuracy, ...]
    #: Of the stored tensors; guards against damage.
    tensors_sha256: str = ""

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict[str, Any]) -> dict[str, Any]:
        _Training.model_validate(training)
        return training

    @property
    def recipe_identity(self) -> str:
        """The recipe's name, and a hash of all that it asks for but the seed, of how many images, of the recipes of weights
        that it went on from, and of those averaged; empty where these are not known.

        How far the recipe was followed is no part of it, see `followed`.
        """
        asked = {key: value for key, value in self.recipe.items() if key not in ("name", "description", "seed")}
        done: dict[str, Any] = {"images": self.training.get("images")}
        if (initial := self.training.get("initial_weights")) is not None:
            done["initial_weights"] = initial.get("recipe")
        if (averaged := self.training.get("averaged")) is not None:
            done["averaged"] = [(part.get("recipe"), part.get("share")) for part in averaged]
        if not all([done.get("initial_weights", True), *(recipe for recipe, _ in done.get("averaged", ()))]):
            return ""
        text = json.dumps([asked, done], sort_keys=True)
        return f"{self.recipe.get('name', 'recipe')} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Epochs done and epochs of the schedule, of every training that these weights went through, as far as they say."""
        earlier = (self.training.get("initial_weights") or {}).get("stages", ())
        own = (self.training.get("epochs"), self.training.get("schedule_epochs"))
        return (*((done, scheduled) for done, scheduled in earlier), *([] if None in own else [own]))

    @property
    def followed(self) -> str:
        """How far the recipe was followed, and those before it of weights to go on from: "17 of 17 epochs, then 11 of 11"."""
        said = [f"{done} of {scheduled}{' epochs' * (i == 0)}" for i, (done, scheduled) in enumerate(self.stages)]
        if "stages" not in (self.training.get("initial_weights") or {"stages": ()}):
            said.insert(0, "not said")
        return ", then ".join(said)

    def has_never_seen(self, holdout: int, seed: int, images: int) -> bool:
        """Whether these weights were not trained on what is held out of `images` images in all.

        A smaller draw of the same seed is part of a larger one. Of initial weights that say nothing it is not known.
        """
        own = self.recipe.get("holdout", 0)
        return (
            self.training.get("held_out_unseen", self.training.get("initial_weights") is None)
            and self.recipe.get("seed") == seed
            and own >= holdout
            and (self.training.get("images") or 0) + own == images
        )


def quantise(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """int8 with one scale per output channel (first axis) for large matrices; the rest unchanged."""
    stored: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        tensor = tensor.detach().cpu()
        if tensor.ndim >= 2 and tensor.numel() >= _MIN_QUANTISED_SIZE and tensor.is_floating_point():
            scale = tensor.float().flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            shape = (-1, *[1] * (tensor.ndim - 1))
            stored[key] = (tensor.float() / scale.view(shape)).round().to(torch.int8).contiguous()
            stored[key + _SCALE_SUFFIX] = scale
        else:
            stored[key] = tensor.detach().clone().contiguous()
    return stored


def dequantise(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 tensors of `quantise`'s result, up to half a step of each channel's scale.

    Raises:
        WeightsError: an int8 tensor comes without its scales, or the other way round.
    """
    state = {}
    for key, tensor in stored.items():
        if key.endswith(_SCALE_SUFFIX):
            continue
        scale = stored.get(key + _SCALE_SUFFIX)
        is_int8 = tensor.dtype == torch.int8
        if is_int8 != (scale is not None) or (is_int8 and tuple(scale.shape) != (tensor.shape[0],)):
            raise WeightsError(f"{key} and its scales do not belong together: expected int8 with one scale per channel")
        state[key] = tensor if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
    return state


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, independent of the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        tensor = (
            (tensor if tensor.layout == torch.strided else tensor.to_dense()).cpu().contiguous().resolve_conj().resolve_neg()
        )
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Of torch's quantised types the scale belongs to the values; seen as bytes in place they are memory out of bounds.
        if tensor.is_quantized:
            digest.update(tensor.dequantize().numpy().tobytes())
            tensor = tensor.int_repr()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_sha256(module: nn.Module) -> str:
    """Digest of all parameters and buffers, also of buffers that are not saved with the module.

    Raises:
        ModelError: some of them have no values yet.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"the model's {name!r} has no values yet: pass an image through lazy layers, and load weights onto the CPU, "
                "before the model is returned"
            )
    return tensors_sha256(tensors)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_weights(path: Path, stored: Mapping[str, torch.Tensor], metadata: WeightsMetadata) -> None:
    """Writes quantised tensors and their metadata as `write_file` does."""
    from lrrobust.results.files import write_file  # pandas comes with it, which nobody needs to read weights

    complete = metadata.model_copy(update={"tensors_sha256": tensors_sha256(stored)})
    write_file(path, save(dict(stored), {_METADATA_KEY: complete.model_dump_json()}))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], WeightsMetadata | None]:
    """The float32 state and the metadata of a file of weights; None where the file carries none of ours.

    Safetensors files, ours or plain, and pickled checkpoints of torch restricted to tensors
    (`weights_only=True`), also wrapped as {"state_dict": ...} or {"model": ...}.

    Raises:
        WeightsError: no such file, not a file of weights, or damaged.
    """
    _require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    # A safetensors file starts with the header's length, eight bytes, and the header's "{".
    if head[8:] == b"{":
        return _read_safetensors(path)
    return _read_checkpoint(path), None


def _require_file(path: Path) -> None:
    """WeightsError for what is none: a pipe would have us wait."""
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}: give the path of a .safetensors or .pt file")


def read_metadata(path: Path) -> WeightsMetadata:
    """Only the metadata of one of our files, without reading its tensors; WeightsError as `read_weights`."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return WeightsMetadata.model_validate_json((file.metadata() or {}).get(_METADATA_KEY, ""))
    except (SafetensorError, OSError, ValidationError) as error:
        raise WeightsError(f"{path} is not a weights file of lrrobust: {_one_line(error)}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], WeightsMetadata | None]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = None if header is None else WeightsMetadata.model_validate_json(header)
    except (SafetensorError, OSError, ValidationError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not a readable weights file, fetch or train it again: {_one_line(error)}") from None
    if metadata is not None and tensors_sha256(stored) != metadata.tensors_sha256:
        raise WeightsError(f"{path} is damaged: its tensors do not have the sha256 its header states; fetch it again")
    return dequantise(stored), metadata


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = load_tensors(path)
    except Exception as error:  # torch raises many types on files that are not its own
        raise WeightsError(
            f"{path} is neither a safetensors file nor a checkpoint of tensors only "
            f"(torch.load with weights_only=True): {_one_line(error)}; save the network's state_dict()"
        ) from None
    if not _is_state(content) and isinstance(content, dict):
        # Beside the optimiser's state and such; whatever its key, there must be no second one to choose from, as of averages.
        states = [key for key, value in content.items() if _is_state(value)]
        usual = next((key for key in ("state_dict", "model") if key in states), None)
        if usual is not None:
            # What has names of its own, such as means and deviations, is no other state of the network.
            states = [key for key in states if key == usual or _bare(content[key]) & _bare(content[usual])]
        if len(states) > 1:
            raise WeightsError(
                f"{path} holds several state dicts ({', '.join(map(str, states))}): save the one that is meant alone"
            )
        if states:
            content = content[states[0]]
    if not _is_state(content):
        found = ", ".join(map(str, content))[:100] or "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise WeightsError(
            f"{path} holds no state dict: expected names mapped to tensors, found {found}; save the network's state_dict()"
        )
    # DistributedDataParallel prefixes every key; where only some have it, others of their names may be there as well.
    is_prefixed = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module." if is_prefixed else ""): tensor for key, tensor in content.items()}


def _bare(state: Mapping[str, torch.Tensor]) -> set[str]:
    return {key.removeprefix("module.") for key in state}


def _is_state(content: object) -> bool:
    if not isinstance(content, dict):
        return False
    return bool(content) and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())


def fit_weights(module: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Loads a state into a module of exactly the same keys, but for a prefix that all of them have, and shapes.

    Raises:
        WeightsError: names the first keys and shapes that differ.
    """
    wanted = module.state_dict()
    # Networks of before torch counted batches lack the counts, which nothing but training reads.
    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    first = needed[0] if needed else ""
    # Lightning, torch.compile and whatever else holds a network put a prefix before its names.
    prefixes = sorted({key.removesuffix(first) for key in state if first and f".{key}".endswith(f".{first}")})
    whole = [prefix for prefix in prefixes if all(f"{prefix}{key}" in state for key in needed)]
    names = list(state)
    if whole and all(name.startswith(whole[0]) and name.removeprefix(whole[0]) in wanted for name in names):
        state = {name.removeprefix(whole[0]): tensor for name, tensor in state.items()}
    state = {**{key: wanted[key] for key in wanted if key not in needed}, **state}
    differences = [f"{key} is missing" for key in wanted if key not in state]
    differences += [f"{key} is not in the network" for key in state if key not in wanted]
    differences += [
        f"{key} is {tuple(state[key].shape)}, the network has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    differences += [
        f"{key} is {flaw}" for key in wanted if key in state and (flaw := _flaw(state[key], wanted[key])) is not None
    ]
    if differences:
        more = len(differences) - _NAMED_DIFFERENCES
        tail = f" and {more} more differences" if more > 0 else ""
        if any(whole):
            tail += f"; all its names are there after {' and '.join(map(repr, whole))}: save what is meant alone, without it"
        first = next(iter(names), "")
        for prefix in {key.removesuffix(first) for key in wanted if first and key.endswith(f".{first}")}:
            if all(f"{prefix}{key}" in wanted for key in names):
                tail += f"; its names are those of {prefix.rstrip('.')}: load it there, before the network is wrapped"
        raise WeightsError(f"{where} does not fit the network: {'; '.join(differences[:_NAMED_DIFFERENCES])}{tail}")
    module.load_state_dict(dict(state))


def _flaw(tensor: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """What keeps a tensor from being a network's, where it is not merely of another precision."""
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided:
        return f"of layout {str(tensor.layout).removeprefix('torch.')}"
    # torch would copy it: quantised weights without their scales, complex ones without their imaginary parts.
    if wanted.is_floating_point() and not tensor.is_floating_point():
        return f"of type {_name(tensor.dtype)}, the network has {_name(wanted.dtype)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    # Torch wraps what is wrong with a checkpoint in advice, part of which is to run the code in it.
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
    return reason.partition(" Please use")[0].partition(" Check the documentation")[0][:300].removesuffix(".")
