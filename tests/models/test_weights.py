import argparse
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lrrobust.data.class_lists import TINY_IMAGENET_200
from lrrobust.errors import ModelError, StoreError, WeightsError
from lrrobust.models import load_classifier
from lrrobust.models.registry import NETWORKS
from lrrobust.models.weights import (
    SHIPPED_WEIGHTS,
    TRAINED_FOLDER,
    Accuracy,
    WeightsMetadata,
    dequantise,
    file_sha256,
    fit_weights,
    quantise,
    read_metadata,
    read_weights,
    save_weights,
    state_sha256,
    tensors_sha256,
)

METADATA = WeightsMetadata(
    name="TEST_V1",
    model="tiny",
    description="made for a test; ε ≤ 1",
    classes=("cat", "dog", "Käfer"),
    input_size=32,
    resize_size=36,
    interpolation="bicubic",
    recipe={"epochs": 3, "learning_rate": 1e-3},
    training={"steps": 7},
    accuracy=(Accuracy(dataset="photos", dataset_sha256="ab", n=500, top1=0.5, top5=0.75, top1_float32=0.51),),
)


@pytest.fixture
def state(tiny_networks, seeded):
    network = tiny_networks(3)
    network(torch.rand(4, 3, 32, 32))  # moves the running statistics
    return network.state_dict()


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "weights.safetensors"
    save_weights(path, quantise(state), METADATA)
    return path


# --- rounding to int8 --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (8, 64, 3, 3), (4096, 1), (1, 4096)])
def test_rounding_costs_at_most_half_a_step_per_channel(shape, seeded):
    # Channels of very different size: one scale for all would lose the small ones.
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    stored = quantise({"weight": weight})
    assert stored["weight"].dtype == torch.int8
    back = dequantise(stored)["weight"]
    assert back.dtype == torch.float32 and back.shape == weight.shape
    step = weight.abs().flatten(1).amax(1) / 127
    assert ((back - weight).abs().flatten(1).amax(1) <= step / 2 * (1 + 1e-5)).all()
    # The largest entry of a channel is hit exactly, so steps are not wider than they must be.
    torch.testing.assert_close(back.abs().flatten(1).amax(1), weight.abs().flatten(1).amax(1))


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(63, 65), torch.randn(100_000), torch.tensor(3), torch.arange(5000).view(50, 100), torch.zeros(0, 5)],
    ids=["small", "vector", "counter", "integers", "empty"],
)
def test_other_tensors_are_untouched(tensor):
    stored = quantise({"x": tensor})
    assert stored.keys() == {"x"} and stored["x"].dtype == tensor.dtype
    torch.testing.assert_close(dequantise(stored)["x"], tensor, rtol=0, atol=0)
    assert tensor.numel() == 0 or stored["x"].data_ptr() != tensor.data_ptr()


def test_channels_of_zeros_and_of_nan(seeded):
    weight = torch.randn(64, 64)
    weight[3], weight[5, 7] = 0.0, float("nan")
    back = dequantise(quantise({"weight": weight}))["weight"]
    assert back[3].count_nonzero() == 0
    # What is not a number must not come back as one.
    assert back[5].isnan().all() and back.isnan().sum() == 64


def test_rounding_again_changes_nothing(state):
    once = dequantise(quantise(state))
    twice = dequantise(quantise(once))
    assert {key for key in state if key + ".int8_scale" in quantise(state)} == {"4.weight"}
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_channels_last_weights(seeded):
    weight = torch.randn(16, 32, 3, 3)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert tensors_sha256(quantise({"w": last})) == tensors_sha256(quantise({"w": weight}))


# --- digest ------------------------------------------------------------------------------------------


def test_digest_sees_names_dtypes_shapes_and_bytes_but_not_order():
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(2)}
    digest = tensors_sha256(tensors)
    assert digest == tensors_sha256(dict(reversed(tensors.items())))
    others = [
        {"c": tensors["a"], "b": tensors["b"]},
        {**tensors, "a": tensors["a"].view(2, 3)},
        {**tensors, "b": tensors["b"].view(1)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "a": tensors["a"].nextafter(torch.tensor(9.0))},
        {"a": tensors["a"]},
    ]
    assert len({digest, *map(tensors_sha256, others)}) == 7


def test_digest_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"weights" * 300_000)
    assert file_sha256(path) == hashlib.sha256(b"weights" * 300_000).hexdigest()


# --- our files ---------------------------------------------------------------------------------------


def test_round_trip(file, state):
    back, metadata = read_weights(file)
    assert metadata == METADATA.model_copy(update={"tensors_sha256": metadata.tensors_sha256})
    assert len(metadata.tensors_sha256) == 64
    assert read_metadata(file) == metadata
    torch.testing.assert_close(back, dequantise(quantise(state)), rtol=0, atol=0)
    assert list(file.parent.iterdir()) == [file]


def test_writing_replaces_the_file_as_a_whole(file, state, monkeypatch):
    before = file.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="no room on disk"):
        save_weights(file, quantise(state), METADATA)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_every_flipped_bit_of_the_tensors_is_noticed(file):
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in [*range(9), *range(header, len(content), (len(content) - header) // 40), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        # Damage of tensors is told from a foreign file.
        said = "is damaged: its tensors do not have the sha256 its header states" if position >= header else r"^[^\n]*$"
        with pytest.raises(WeightsError, match=said):
            read_weights(file)


@pytest.mark.parametrize("length", [0, 1, 8, 9, 200, -100, -1])
def test_truncated_file(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"^[^\n]*(not a readable weights file|neither a safetensors file nor)[^\n]*$"):
        read_weights(file)


@pytest.mark.parametrize(
    "header",
    ["{}", "not json", json.dumps({**METADATA.model_dump(mode="json"), "format_version": 2})],
    ids=["empty", "text", "newer"],
)
def test_header_that_is_not_ours(tmp_path, header):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={"lrrobust": header})
    with pytest.raises(WeightsError, match="is not a readable weights file"):
        read_weights(path)
    with pytest.raises(WeightsError, match="is not a weights file of lrrobust"):
        read_metadata(path)


def test_metadata_of_what_is_not_our_file(tmp_path):
    with pytest.raises(WeightsError, match="no weights file .*none.safetensors"):
        read_metadata(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match="is not a weights file of lrrobust"):
        read_metadata(tmp_path / "plain.safetensors")


# --- other people's files ----------------------------------------------------------------------------


def test_missing_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "pipe.pt"):
        for read in (read_weights, read_metadata):
            with pytest.raises(WeightsError, match="no weights file at .*give the path of a .safetensors or .pt file"):
                read(path)


def test_plain_safetensors(tmp_path, state):
    path = tmp_path / "plain.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    back, metadata = read_weights(path)
    assert metadata is None
    torch.testing.assert_close(back, dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(9.5), "epoch": np.int64(3)},
    ],
    ids=["plain", "module.", "state_dict", "model", "both", "options"],
)
def test_checkpoints(tmp_path, state, wrap):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(dict(state)), path)
    back, metadata = read_weights(path)
    assert metadata is None
    torch.testing.assert_close(back, dict(state), rtol=0, atol=0)


def test_what_a_caller_allows_torch_to_read_stays_allowed(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_weights(tmp_path / "checkpoint.pt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_no_checkpoint(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="TorchScript archive: return torch.jit.load of it from"):
        read_weights(tmp_path / "script.pt")


def test_a_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    """torch itself would load it as another number."""
    path, weight = tmp_path / "checkpoint.pt", torch.linspace(1, 2, 50)
    torch.save({"weight": weight}, path)
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 100] ^= 64
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="data/0 in it is damaged, as its checksum shows"):
        read_weights(path)


def test_an_empty_checkpoint_says_what_is_wrong(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"weights_only=True\): EOFError; save the network's"):
        read_weights(tmp_path / "checkpoint.pt")


def test_names_with_and_without_the_prefix_of_one_network_are_not_merged(tmp_path, state):
    torch.save({**state, **{f"module.{key}": tensor + 1 for key, tensor in state.items()}}, tmp_path / "checkpoint.pt")
    back, _ = read_weights(tmp_path / "checkpoint.pt")
    assert len(back) == 2 * len(state)


def test_a_state_of_what_is_wrapped_says_where_it_belongs():
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
    with pytest.raises(WeightsError, match="its names are those of 1: load it there, before the network is wrapped"):
        fit_weights(network, network[1].state_dict(), "best.pth")
    with pytest.raises(WeightsError) as other:
        fit_weights(network, {"0.weight": torch.zeros(2, 2), "classifier.weight": torch.zeros(2)}, "best.pth")
    assert "load it there" not in str(other.value)


def test_a_state_beside_other_things_whatever_its_name(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save({"net": dict(state), "acc": 0.9, "optimizer": {"state": {}, "lr": 0.1}}, path)
    torch.testing.assert_close(read_weights(path)[0], dict(state), rtol=0, atol=0)
    torch.save({"net": dict(state), "ema": dict(state)}, path)
    with pytest.raises(WeightsError, match=r"holds several state dicts \(net, ema\): save the one that is meant alone"):
        read_weights(path)
    # Nor where one has a usual name: an average beside it may be what is meant.
    torch.save({"model": dict(state), "model_ema": dict(state)}, path)
    with pytest.raises(WeightsError, match=r"holds several state dicts \(model, model_ema\)"):
        read_weights(path)
    torch.save({"model": dict(state), "normalize": {"mean": torch.zeros(3), "std": torch.ones(3)}}, path)
    torch.testing.assert_close(read_weights(path)[0], dict(state), rtol=0, atol=0)
    torch.save({"acc": 0.9, "epoch": 3}, path)
    with pytest.raises(WeightsError, match=r"holds no state dict: .*, found acc, epoch; save"):
        read_weights(path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {}, {"epoch": 3}, {0: torch.zeros(2)}, {"state_dict": {}}, torch.zeros(2)]
)
def test_checkpoint_without_a_state(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="holds no state dict: expected names mapped to tensors"):
        read_weights(path)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["torch", "pickle"]
)
def test_code_in_a_pickle_is_not_run(tmp_path, save):
    target, path = tmp_path / "touched", tmp_path / "checkpoint.pt"
    save({"weight": _Bomb(str(target))}, path)
    with pytest.raises(
        WeightsError, match=r"^[^\n]*neither a safetensors file nor a checkpoint of tensors only[^\n]*$"
    ) as caught:
        read_weights(path)
    assert "save the network's state_dict()" in str(caught.value) and "False" not in str(caught.value)
    assert not target.exists()
    # The file would have run its code where code is allowed: the test can fail.
    torch.load(path, weights_only=False)["weight"].close() if save is torch.save else pickle.loads(path.read_bytes())[
        "weight"
    ].close()
    assert target.exists()


# --- fitting -----------------------------------------------------------------------------------------


def test_fitting_weights_are_loaded(state, tiny_networks):
    network = tiny_networks(3)
    fit_weights(network, state, "here")
    torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)


def test_weights_that_do_not_fit_name_the_first_differences():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = {**before, "0.weight": torch.zeros(2, 4), "head.bias": torch.zeros(2)}
    del state["1.bias"]
    with pytest.raises(WeightsError) as caught:
        fit_weights(network, state, "file.pt")
    assert str(caught.value) == (
        "file.pt does not fit the network: 1.bias is missing; head.bias is not in the network; "
        "0.weight is (2, 4), the network has (2, 3)"
    )
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "net.0."])
def test_a_prefix_that_all_names_have_is_left_out(prefix):
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {prefix + key: tensor + 1 for key, tensor in network.state_dict().items()}
    fit_weights(network, state, "file.pt")
    torch.testing.assert_close(network[1].bias.detach(), state[f"{prefix}1.bias"], rtol=0, atol=0)
    for more, said in (({"criterion.weight": torch.ones(2)}, ""), (network.state_dict(), "'' and ")):
        with pytest.raises(WeightsError, match=f"; all its names are there after {said}'{prefix}': save what is meant alone"):
            fit_weights(network, {**state, **more}, "file.pt")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_states_of_before_batches_were_counted_fit(prefix):
    network = nn.BatchNorm2d(3)
    state = {prefix + key: tensor + 1 for key, tensor in network.state_dict().items() if key != "num_batches_tracked"}
    fit_weights(network, state, "file.pt")
    assert network.running_mean.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda tensor: (100 * tensor).to(torch.int8), "of type int8, the network has float32"),
        (lambda tensor: tensor.to(torch.complex64), "of type complex64, the network has float32"),
        (lambda tensor: tensor.to("meta"), "without values"),
        (lambda tensor: tensor.to_sparse(), "of layout sparse_coo"),
    ],
    ids=["int8", "complex", "meta", "sparse"],
)
def test_tensors_that_are_no_weights_are_refused(change, found):
    """Copied into floats, an int8 tensor is the weights of a network but for its scales, and nobody is told."""
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    state = network.state_dict()
    with pytest.raises(WeightsError, match=f"^file.pt does not fit the network: weight is {found}$"):
        fit_weights(network, {**state, "weight": change(state["weight"])}, "file.pt")
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_loaded(dtype):
    network = nn.Linear(3, 2)
    halves = {key: torch.full_like(tensor, 0.5).to(dtype) for key, tensor in network.state_dict().items()}
    fit_weights(network, halves, "file.pt")
    assert network.weight.dtype == torch.float32 and (network.weight == 0.5).all()


def test_many_differences_are_counted():
    with pytest.raises(
        WeightsError, match=r"0.weight is missing; 0.bias is missing; 1.weight is missing and 2 more differences$"
    ):
        fit_weights(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), {"x": torch.zeros(1)}, "file.pt")


# --- what comes with the package ---------------------------------------------------------------------


SHIPPED = [(name, weights) for name in SHIPPED_WEIGHTS for weights in SHIPPED_WEIGHTS[name]]


def test_the_identity_of_a_recipe_is_what_was_done_not_what_it_is_called():
    def identity(recipe={}, **training):
        asked = {"name": "short", "description": "Short.", "seed": 0, "epochs": 3} | recipe
        return METADATA.model_copy(update={"recipe": asked, "training": {"images": 100, "steps": 9} | training}).recipe_identity

    plain = identity()
    assert plain.startswith("short ") and plain == identity({"seed": 1, "description": "Other words."}, wall_s=3.0)
    # The same schedule, left earlier.
    assert plain == identity(steps=6, epochs=2, schedule_epochs=3)
    others = [identity({"epochs": 4}), identity(images=99)]
    # Weights of an adversarial training, say, to go on from.
    others += [identity(initial_weights={"name": "V0", "sha256": "ab", "recipe": recipe}) for recipe in ("short 1", "at 2")]
    others += [identity(averaged=[{"name": "V0", "share": 0.5, "recipe": recipe}]) for recipe in ("short 1", "at 2")]
    assert len({plain, *others}) == 7
    assert others[2] == identity(initial_weights={"name": "V1", "sha256": "cd", "recipe": "short 1"})


@pytest.mark.parametrize("unknown", [{"name": "V0", "sha256": "ab"}, {"name": "V0", "recipe": ""}])
def test_who_went_on_from_unknown_weights_has_no_known_recipe(unknown):
    for training in ({"initial_weights": unknown}, {"averaged": [{"name": "V1", "share": 0.5, "recipe": "short 1"}, unknown]}):
        assert METADATA.model_copy(update={"training": training}).recipe_identity == ""


@pytest.mark.parametrize(
    "training",
    [
        {"images": "many"},
        {"images": 0},
        {"initial_weights": {"stages": [1]}},
        {"initial_weights": {"stages": [[1, -2]]}},
        {"averaged": 3},
    ],
)
def test_a_header_with_a_wrong_account_of_the_training_is_refused(tmp_path, training):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"a": torch.zeros(1)}, METADATA.model_copy(update={"training": training}))
    with pytest.raises(WeightsError, match="training"):
        read_weights(path)


@pytest.mark.parametrize(
    ("training", "split", "unseen"),
    [
        ({}, (10, 0, 110), True),
        ({}, (5, 0, 110), True),  # a part of what was held out
        ({}, (11, 0, 110), False),
        ({}, (10, 1, 110), False),
        ({}, (10, 0, 111), False),
        ({"held_out_unseen": False}, (10, 0, 110), False),
        ({"initial_weights": {"name": "V0"}}, (10, 0, 110), False),
        ({"initial_weights": {"name": "V0"}, "held_out_unseen": True}, (10, 0, 110), True),
    ],
)
def test_whether_images_were_trained_on(training, split, unseen):
    recipe = {"holdout": 10, "seed": 0}
    metadata = METADATA.model_copy(update={"recipe": recipe, "training": {"images": 100} | training})
    assert metadata.has_never_seen(*split) is unseen


@pytest.mark.parametrize(
    ("training", "followed"),
    [
        ({}, ""),
        ({"epochs": 2, "schedule_epochs": 3}, "2 of 3 epochs"),
        (
            {"epochs": 2, "schedule_epochs": 3, "initial_weights": {"stages": [[17, 17], [1, 4]]}},
            "17 of 17 epochs, then 1 of 4, then 2 of 3",
        ),
        ({"epochs": 2, "schedule_epochs": 3, "initial_weights": {"name": "V0"}}, "not said, then 2 of 3 epochs"),
    ],
)
def test_how_far_recipes_were_followed(training, followed):
    assert METADATA.model_copy(update={"training": training}).followed == followed


def test_the_shipped_pair_is_by_one_recipe_and_as_accurate():
    pair = [
        read_metadata(TRAINED_FOLDER / SHIPPED_WEIGHTS[name]["TINY_IMAGENET_V1"].file) for name in ("lr_resnet50", "resnet50")
    ]
    ours, theirs = pair
    assert ours.recipe_identity == theirs.recipe_identity != ""
    assert all(len(metadata.stages) == 2 for metadata in pair)
    top1 = [
        {accuracy.dataset_sha256: accuracy.top1 for accuracy in metadata.accuracy if accuracy.n == 5000} for metadata in pair
    ]
    assert top1[0].keys() == top1[1].keys() != set()
    assert all(abs(top1[0][key] - top1[1][key]) <= 0.01 for key in top1[0])


@pytest.mark.parametrize(("name", "weights"), SHIPPED)
def test_shipped_weights(name, weights):
    shipped = SHIPPED_WEIGHTS[name][weights]
    path = TRAINED_FOLDER / shipped.file
    assert path.is_file() and path.stat().st_size <= 25_000_000
    assert file_sha256(path) == shipped.sha256
    metadata = read_metadata(path)
    assert name in NETWORKS and metadata.model == name
    assert metadata.name == weights and metadata.description and metadata.recipe and metadata.training
    if len(metadata.classes) == 200:
        assert metadata.classes == TINY_IMAGENET_200
    assert metadata.accuracy
    for accuracy in metadata.accuracy:
        assert accuracy.n > 0 and len(accuracy.dataset_sha256) == 64
        # Far above chance, and rounding to int8 has cost next to nothing.
        assert 10 / len(metadata.classes) < accuracy.top1 <= accuracy.top5 <= 1
        assert accuracy.top1 == pytest.approx(accuracy.top1_float32, abs=0.02)
    classifier = load_classifier(name, weights=weights, imagenet_classes=())
    assert classifier.classes == metadata.classes and classifier.weights == metadata.name
    images = torch.rand(1, 3, metadata.input_size, metadata.input_size)
    with torch.inference_mode():
        logits = classifier.module.eval()(images)
    assert logits.shape == (1, len(metadata.classes)) and logits.isfinite().all()


def test_no_file_of_weights_is_shipped_unlisted():
    found = {path.name for path in TRAINED_FOLDER.glob("*")} if TRAINED_FOLDER.is_dir() else set()
    assert {name for name in found if name.endswith((".safetensors", ".pt"))} == {
        SHIPPED_WEIGHTS[name][weights].file for name, weights in SHIPPED
    }


@pytest.mark.parametrize("module", [torch.nn.LazyLinear(3), torch.nn.Linear(2, 3, device="meta")], ids=["lazy", "meta"])
def test_a_network_without_values_is_refused_in_one_line(module):
    with pytest.raises(ModelError, match="'weight' has no values yet: .*before the model is returned") as caught:
        state_sha256(module)
    assert "\n" not in str(caught.value)


def test_buffers_of_every_layout_have_a_digest():
    module = torch.nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
    before = state_sha256(module)
    assert state_sha256(module) == before
    module.sparse = (2 * torch.eye(3)).to_sparse()
    assert state_sha256(module) != before


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_buffers_have_a_digest():
    def digest(scale):
        module = torch.nn.Module()
        module.register_buffer("table", torch.quantize_per_tensor(scale * torch.arange(4.0), scale, 0, torch.quint8))
        return state_sha256(module)

    assert digest(0.5) == digest(0.5) != digest(0.25)
