import csv
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from own_process import run_process
from PIL import Image
from torch import nn

from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import ConfigError, DataError, StoreError, UnknownNameError, WeightsError
from lrrobust.models import load_classifier
from lrrobust.models.weights import quantise, read_metadata
from lrrobust.training import export, trainer
from lrrobust.training.accuracy import accuracy_on_set
from lrrobust.training.images import TrainingSet
from lrrobust.training.optimizers import group_parameters, learning_rate
from lrrobust.training.ranks import Ranks
from lrrobust.training.recipe import Phase
from lrrobust.training.trainer import LOG_COLUMNS, Training

#: 40 of the 48 images are trained on, 8 at a time, for two epochs.
STEPS_PER_EPOCH, STEPS = 5, 10

TIMINGS = {"images_per_s", "wall_s"}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are grouped by thread: runs are compared bit for bit at one number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tiny_lr_net, recipe, colours, tmp_path):
    """start(folder name, **changes of the recipe) -> a Training there."""

    def build(folder="run", data=colours, model=tiny_lr_net, stop_after=None, **changes):
        return Training(model, recipe.model_copy(update=changes), data, tmp_path / folder, stop_after=stop_after)

    return build


def state_of(training):
    """All that decides how a training goes on, and what it has said so far except for times."""
    rows = [{key: value for key, value in row.items() if key not in TIMINGS} for row in training.rows]
    return {
        "network": dict(training.network.state_dict()),
        "average": dict(training.average.state_dict()),
        "optimizer": training.optimizer.state_dict()["state"],
        "step": training.step,
        "rows": rows,
    }


def assert_same(training, other):
    ours, theirs = state_of(training), state_of(other)
    assert ours["step"] == theirs["step"] and ours["rows"] == theirs["rows"]
    for part in ("network", "average", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


@pytest.fixture
def uninterrupted(start):
    training = start("uninterrupted")
    training.run()
    return training


@pytest.fixture
def goes_on(start, uninterrupted):
    """goes_on(step) -> a Training that is started again, is at that step, and ends as if nothing had been."""

    def check(step):
        resumed = start()
        assert resumed.step == step
        resumed.run()
        assert_same(resumed, uninterrupted)
        return resumed

    return check


# --- learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_learns(start, precision):
    training = start(phases=(Phase(epochs=12, size=16),), precision=precision)
    training.run()
    losses = [row["train_loss"] for row in training.rows]
    assert losses[-1] < 0.7 * losses[0] and losses[0] > 1.5
    assert training.rows[-1]["holdout_top1"] >= 0.75


@pytest.mark.parametrize("model", ["lr_resnet26", "resnet26"])
def test_our_networks_take_a_step(recipe, colours, tmp_path, model):
    few = TrainingSet(colours.images[:8], colours.labels[:8])
    changed = recipe.model_copy(
        update={"phases": (Phase(epochs=1, size=32),), "holdout": 0, "batch_size": 4, "precision": "bf16"}
    )
    training = Training(model, changed, few, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}

    def stop(_):
        raise StopIteration

    with pytest.raises(StopIteration):
        training.run(on_step=stop)
    after = dict(training.network.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_what_is_reported(start):
    training = start()
    steps, epochs = [], []
    training.run(steps.append, epochs.append)
    assert [(p.epoch, p.epochs, p.step, p.steps) for p in steps] == [(1 + s // 5, 2, s + 1, 10) for s in range(10)]
    assert all(p.loss > 0 and p.images_per_s > 0 for p in steps)
    assert epochs == training.rows
    assert [(row["epoch"], row["step"], row["image_size"]) for row in epochs] == [(1, 5, 16), (2, 10, 20)]
    for row, part in zip(epochs, (steps[:5], steps[5:]), strict=True):
        assert row["train_loss"] == pytest.approx(sum(p.loss for p in part) / 5)
    with (training.folder / "log.csv").open() as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == LOG_COLUMNS
    assert [{key: float(value) for key, value in row.items()} for row in written] == epochs


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels(start, smoothing, monkeypatch):
    training = start(label_smoothing=smoothing, mixing=None)
    seen = []
    original = torch.nn.functional.cross_entropy

    def cross_entropy(logits, targets, **options):
        loss = original(logits, targets, **options)
        if logits.requires_grad:
            classes = logits.shape[1]
            smoothed = torch.nn.functional.one_hot(targets, classes) if targets.ndim == 1 else targets
            smoothed = (1 - smoothing) * smoothed + smoothing / classes
            seen.append((loss.item(), -(smoothed * logits.detach().log_softmax(1)).sum(1).mean().item()))
        return loss

    monkeypatch.setattr(trainer.F, "cross_entropy", cross_entropy)
    training.run()
    assert len(seen) == STEPS
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-5)


def test_held_out_accuracy_is_that_of_the_average(uninterrupted):
    held = uninterrupted.held_out
    with torch.inference_mode():
        best = uninterrupted.average(held.images / 255).argmax(1)
    assert uninterrupted.rows[-1]["holdout_top1"] == (best == held.labels).float().mean().item()


def test_without_held_out_images_there_is_no_accuracy(start):
    training = start(holdout=0)
    training.run()
    assert training.step == 12 and math.isnan(training.rows[-1]["holdout_top1"])


# --- data --------------------------------------------------------------------------------------------


def test_held_out_images_are_balanced_and_not_trained_on(start, colours):
    training = start()
    assert sorted(training.held_out.labels.tolist()) == list(range(8))
    trained = {image.numpy().tobytes() for image in training.train_set.images}
    held = {image.numpy().tobytes() for image in training.held_out.images}
    assert (len(trained), len(held), len(trained & held)) == (40, 8, 0)
    everything = {image.numpy().tobytes(): label for image, label in zip(colours.images, colours.labels.tolist(), strict=True)}
    for part in (training.train_set, training.held_out):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert everything[image.numpy().tobytes()] == label


def test_batches_hold_every_image_once_an_epoch_with_its_label(start):
    # Images are made to say which they are, whatever is cropped.
    training = start()
    numbers = torch.arange(40, dtype=torch.uint8)
    training.train_set = TrainingSet((5 * numbers).view(40, 1, 1, 1).expand(40, 3, 16, 16), 1000 + numbers.long())
    orders = []
    for epoch, size in ((0, 16), (1, 20)):
        order = []
        training.step = 5 * epoch
        for images, labels in training.batches(epoch):
            assert images.shape == (8, 3, size, size)
            torch.testing.assert_close((images.amax((1, 2, 3)) * 51).round().long() + 1000, labels)
            order += labels.tolist()
        assert sorted(order) == list(range(1000, 1040))
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_batches_are_functions_of_seed_and_step(start):
    one, two, other = start("a"), start("b"), start("c", seed=4)
    torch.rand(17)
    first, second, *_ = one.batches(0)
    torch.testing.assert_close(first, next(two.batches(0)), rtol=0, atol=0)
    assert not torch.equal(first[0], next(other.batches(0))[0])
    two.step = 1
    torch.testing.assert_close(second, next(two.batches(0)), rtol=0, atol=0)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    "batch_size, holdout, message",
    [(64, 8, "48 images, without the 8 that the recipe holds out, do not fill a batch of 64"), (8, 49, "without the 49 that")],
)
def test_too_few_images(start, batch_size, holdout, message):
    with pytest.raises(DataError, match=message):
        start(batch_size=batch_size, holdout=holdout)


def test_unknown_model_and_classes(start):
    with pytest.raises(UnknownNameError, match="unknown network 'tinny': did you mean tiny"):
        start(model="tinny")
    with pytest.raises(UnknownNameError, match="unknown class list or file 'tiny-imagenet-20': did you mean tiny-imagenet-200"):
        start(classes="tiny-imagenet-20")


# --- the parts of a step -----------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine(start):
    training = start(phases=(Phase(epochs=8, size=16),), warmup=0.25, learning_rate=0.2)
    rates = [learning_rate(training.recipe, step, training.steps) for step in range(40)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 30)) for step in range(30)])
    assert max(rates) == pytest.approx(0.2) and 0 < rates[-1] < 0.001
    used = []
    training.run(on_step=lambda _: used.append({group["lr"] for group in training.optimizer.param_groups}))
    assert used == [{rate} for rate in rates]


def test_average_follows_its_formula(start):
    training = start(ema_decay=0.3)
    # A copy of the network as it starts.
    expected = {key: tensor.double().clone() for key, tensor in training.network.state_dict().items()}

    def follow(progress):
        step = progress.step - 1
        decay = min(0.3, (1 + step) / (10 + step))
        for key, tensor in training.network.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * tensor.double()
        for key, tensor in training.average.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-5, atol=1e-6)
            else:
                assert tensor == progress.step

    training.run(on_step=follow)
    assert training.step == STEPS


def test_weight_decay_is_for_matrices_and_kernels(start):
    training = start(weight_decay=0.3)
    decayed, others = training.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in training.network.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert {names[id(p)] for p in others["params"]} == {
        name
        for name, module in training.network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in (f"{name}.weight", f"{name}.bias")
    } | {"2.geometry.hidden.bias", "2.geometry.output.bias", "7.bias"}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - {names[id(p)] for p in others["params"]}


def test_parameter_groups_of_a_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, others = group_parameters(network, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert [p.shape for p in others["params"]] == [(4,)] * 3


def test_gradients_are_clipped(start):
    training = start(gradient_clip=1e-3)
    training.network[-1].weight.data.mul_(100)
    norms = []

    def measure(_):
        norms.append(torch.stack([p.grad.norm() for p in training.network.parameters()]).norm().item())

    training.run(on_step=measure)
    assert max(norms) <= 1e-3 * 1.001 and norms[0] == pytest.approx(1e-3, rel=0.01)


def test_loss_that_is_no_number_stops_the_training(start):
    training = start()
    training.network[-1].bias.data[0] = math.nan
    with pytest.raises(ConfigError, match=r"^the training loss became nan at step 0: lower learning_rate [^\n]*$"):
        training.run()
    assert not training.checkpoint_path.exists()


def test_gradient_that_is_no_number_spoils_no_weight(start):
    training = start()
    training.network[-1].weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    with pytest.raises(ConfigError, match="the training gradient became nan at step 0"):
        training.run()
    torch.testing.assert_close(dict(training.network.named_parameters()), before, rtol=0, atol=0)


# --- bursts of steps ---------------------------------------------------------------------------------


@pytest.fixture
def bursts(monkeypatch):
    """Three steps at a time, as on a GPU, where numbers are looked at now and then only."""
    monkeypatch.setattr(trainer, "BURST_STEPS", {"cpu": 3})


def test_bursts_take_the_same_steps(start, uninterrupted, bursts):
    training = start()
    steps, epochs = [], []
    training.run(steps.append, epochs.append)
    # Each ends with its epoch.
    assert [progress.step for progress in steps] == [3, 5, 8, 10]
    assert_same(training, uninterrupted)


def test_interrupted_between_bursts(start, goes_on, bursts):
    with pytest.raises(KeyboardInterrupt):
        start().run(on_step=_Stop(8))
    goes_on(8)


def test_the_first_bad_number_of_a_burst_is_reported_and_not_stored(start, bursts, monkeypatch):
    training = start()
    monkeypatch.setattr(training, "_check_finite_at_once", lambda: None)
    step = training.optimizer.step

    def spoil(*_, **__):
        step()
        if training.step == 3:
            training.network[-1].bias.data[0] = math.nan

    monkeypatch.setattr(training.optimizer, "step", spoil)
    with pytest.raises(ConfigError, match="the training loss became nan at step 4: lower learning_rate"):
        training.run()
    assert not training.checkpoint_path.exists()


# --- interruptions -----------------------------------------------------------------------------------


class _Stop:
    """Raises KeyboardInterrupt after step `step`."""

    def __init__(self, step):
        self.step = step

    def __call__(self, progress):
        if progress.step == self.step:
            raise KeyboardInterrupt


# The last of an epoch and the last of all among them: their row is not written yet.
@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])
def test_interrupted_run_goes_on_as_if_nothing_had_been(start, goes_on, step):
    with pytest.raises(KeyboardInterrupt):
        start().run(on_step=_Stop(step))
    assert (goes_on(step).folder / "log.csv").read_text().count("\n") == 3


def test_interrupted_while_it_measures(start, goes_on, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "accuracy_on_images", lambda *_: _fail(KeyboardInterrupt()))
        start().run()
    assert start().rows == []
    goes_on(5)


def test_an_image_that_cannot_be_read_loses_no_step(start, goes_on, monkeypatch):
    training = start()
    take = training._train_step
    error = DataError("damaged")
    monkeypatch.setattr(training, "_train_step", lambda *batch: take(*batch) if training.step < 2 else _fail(error))
    with pytest.raises(DataError, match="damaged"):
        training.run()
    goes_on(2)


def test_a_process_that_others_leave_alone_says_so_in_one_line(start, monkeypatch):
    training = start()
    training.ranks = Ranks(0, 2)
    monkeypatch.setattr(training, "_train_step", lambda *_: _fail(RuntimeError("Connection closed by peer [127.0.0.1]:42203.")))
    for end in ("", "; the last checkpoint is kept"):
        with pytest.raises(ConfigError, match=f"together has ended.* run the same command again{end}$"):
            training.run()
        training.save_checkpoint()


def _fail(error):
    raise error


def test_ctrl_c_waits_for_the_step_to_end(start, goes_on):
    training = start()

    def press(*_):
        if training.step == 2:
            # In the middle of a step: running statistics have moved, weights have not.
            signal.raise_signal(signal.SIGINT)

    training.network[1].register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert training.step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    goes_on(3)


_KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
import torch
from lrrobust.models import registry
from lrrobust.training import trainer
from lrrobust.training.images import TrainingSet
from lrrobust.training.recipe import Recipe

conftest_path, recipe, data, folder = sys.argv[1:]
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("training_conftest", conftest_path)
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
registry.NETWORKS = {"tiny": conftest.TinyLrNet}
trainer.CHECKPOINT_INTERVAL_S = 0.0

def kill(progress):
    if progress.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

images, labels = torch.load(data)
trainer.Training("tiny", Recipe.model_validate_json(recipe), TrainingSet(images, labels), Path(folder)).run(kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_killed_process(start, uninterrupted, recipe, colours, tmp_path):
    torch.save((colours.images, colours.labels), tmp_path / "data.pt")
    conftest = Path(__file__).with_name("conftest.py")
    arguments = [conftest, json.dumps(recipe.model_dump(mode="json")), tmp_path / "data.pt", tmp_path / "run"]
    done = run_process(sys.executable, "-c", _KILLED, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = start()
    assert resumed.step == 7
    resumed.run()
    assert_same(resumed, uninterrupted)


def test_checkpoints_are_written_in_between(start, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_INTERVAL_S", 0.0)
    training = start()
    seen = []

    def look(_):
        seen.append(start().step)

    training.run(on_step=look)
    assert seen == list(range(STEPS))


def test_finished_run_does_nothing_more(start, uninterrupted):
    again = start("uninterrupted")
    assert again.step == STEPS
    log = again.folder / "log.csv"
    before = log.read_bytes()
    log.unlink()
    again.run(on_step=lambda _: pytest.fail("a finished run took a step"))
    assert_same(again, uninterrupted)
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.02}, "recipe.learning_rate"),
        ({"model": "other"}, "model"),
        ({"holdout": 0}, "recipe.holdout"),
        ({"seed": 4}, "recipe.seed"),
    ],
)
def test_folder_of_another_training(start, uninterrupted, change, named):
    content = uninterrupted.checkpoint_path.read_bytes()
    with pytest.raises(
        ConfigError, match=rf"checkpoint.pt belongs to another training \({named} differ\): choose another --out"
    ):
        start("uninterrupted", **change)
    assert uninterrupted.checkpoint_path.read_bytes() == content


def test_a_class_more_in_the_list_makes_another_training(start, tmp_path):
    """Though the recipe names the same file, and the images have the same labels."""
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    start("run", classes=str(names)).save_checkpoint()
    names.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(ConfigError, match=r"checkpoint.pt belongs to another training \(classes differ\)"):
        start("run", classes=str(names))


def test_a_checkpoint_that_names_no_classes_goes_on(start, uninterrupted):
    """As those of versions before."""
    state = torch.load(uninterrupted.checkpoint_path, weights_only=True)
    del state["identity"]["classes"]
    torch.save(state, uninterrupted.checkpoint_path)
    assert start("uninterrupted").step == STEPS


def _with_a_flipped_bit(path):
    """In the weights, which torch would read as they are."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["network"]["7.weight"].numpy().tobytes()) + 3] ^= 64
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"network": {}}, path),
        lambda path: path.write_bytes(_with_a_flipped_bit(path)),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["empty", "one byte short", "short", "text", "list", "another checkpoint", "flipped bit", "pipe"],
)
def test_damaged_checkpoint(start, uninterrupted, damage):
    damage(uninterrupted.checkpoint_path)
    with pytest.raises(
        WeightsError, match=r"^the checkpoint [^\n]*checkpoint.pt cannot be read \(\w+\): delete it to start again[^\n]*$"
    ):
        start("uninterrupted")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("step"),
        lambda state: state.update(step="six"),
        lambda state: state["network"].popitem(),
        lambda state: state["optimizer"]["param_groups"].clear(),
        lambda state: state["rows"].clear(),
        lambda state: state["rows"][0].clear(),
        lambda state: state.update(step=-1),
        lambda state: state.update(wall_s="long"),
    ],
    ids=["a key less", "text", "a tensor less", "no groups", "no epochs", "an empty epoch", "before the start", "no time"],
)
def test_a_checkpoint_with_other_contents(start, uninterrupted, change):
    """As another version might write, of the same training."""
    path = uninterrupted.checkpoint_path
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    told = r"^the checkpoint [^\n]*checkpoint.pt does not hold what this version writes \(\w+\): [^\n]*$"
    with pytest.raises(WeightsError, match=told):
        start("uninterrupted")


def test_a_checkpoint_is_on_disk_before_it_replaces_the_last(uninterrupted, monkeypatch):
    """Else a power cut may leave a name without content."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    uninterrupted.save_checkpoint()
    assert calls == ["fsync", "replace"]


def test_two_trainings_do_not_write_one_folder(start, uninterrupted):
    first, second = start(), start()

    def begin_another(_):
        content = first.checkpoint_path.read_bytes() if first.checkpoint_path.exists() else None
        with pytest.raises(StoreError, match="another lrrobust process .pid \\d+. is writing .*; wait for it"):
            second.run()
        assert second.step == 0 and (first.checkpoint_path.read_bytes() if content is not None else None) == content

    first.run(begin_another)
    assert_same(first, uninterrupted)
    second.run()  # once it is free


def test_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StoreError, match="could not write .*run/below .Not a directory.; what was computed before is kept"):
        start("run/below").run()
    # Where there is no checkpoint none is said to be kept.
    with pytest.raises(StoreError, match=r"cannot write [^;]*checkpoint.pt: [^;]*; make room and run the same command again"):
        start("run/below").save_checkpoint()


def _half_a_file(state, file):
    file.write(b"half a file")
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")


def _no_replacing(source, target):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("module, name, fail", [(torch, "save", _half_a_file), (os, "replace", _no_replacing)])
def test_failure_to_write_keeps_the_last_checkpoint(uninterrupted, monkeypatch, module, name, fail):
    content = uninterrupted.checkpoint_path.read_bytes()
    uninterrupted.wall_s += 1  # so that the new one would differ
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(StoreError, match="(No space left on device|Input/output error); the last checkpoint is kept"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            uninterrupted.save_checkpoint()
    assert uninterrupted.checkpoint_path.read_bytes() == content
    assert {path.name for path in uninterrupted.folder.iterdir()} == {"checkpoint.pt", "log.csv", ".lock"}


# --- stopped before the end of the schedule ----------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_gone_on_with_is_as_if_run_through(start, optimizer):
    phases = tuple(Phase(epochs=1, size=size) for size in (16, 20, 16))
    through = start("through", phases=phases, optimizer=optimizer)
    averages = []
    through.run(on_epoch=lambda _: averages.append({k: v.clone() for k, v in through.average.state_dict().items()}))
    for stop_after, expected in ((1, averages[0]), (2, averages[1]), (None, averages[2])):
        part = start("parts", phases=phases, optimizer=optimizer, stop_after=stop_after)
        told = []
        part.run(told.append)
        end = stop_after or 3
        # A bar that ends where the training does.
        assert {(p.epochs, p.steps) for p in told} == {(end, 5 * end)} and part.steps == 5 * end
        assert [p.step for p in told] == list(range(5 * end - 4, 5 * end + 1))
        torch.testing.assert_close(dict(part.average.state_dict()), expected, rtol=0, atol=0)
    assert_same(part, through)


def test_stopped_again_at_the_same_epoch_does_nothing_more(start):
    start(stop_after=1).run()
    again = start(stop_after=1)
    again.run(on_step=lambda _: pytest.fail("a finished run took a step"))
    assert (again.step, len(again.rows)) == (5, 1)


@pytest.mark.parametrize("stop_after", [-1, 0, 3])
def test_epochs_that_the_schedule_does_not_have(start, tmp_path, stop_after):
    message = (
        f"^--stop-after: expected 1 to 2, the epochs of the recipe colours, found {stop_after}: "
        "give a number among them, or leave the option out to train to the end$"
    )
    with pytest.raises(ConfigError, match=message):
        start(stop_after=stop_after)
    assert not (tmp_path / "run").exists()


def test_checkpoint_past_the_epoch_to_stop_after(start):
    with pytest.raises(KeyboardInterrupt):
        start().run(on_step=_Stop(6))
    content = start().checkpoint_path.read_bytes()
    message = (
        r"checkpoint.pt: expected at most step 5, the end of epoch 1, for --stop-after 1, found step 6: "
        r"the weights of then are gone; choose another --out [^\n]*$"
    )
    with pytest.raises(ConfigError, match=message):
        start(stop_after=1)
    assert start().checkpoint_path.read_bytes() == content
    assert start(stop_after=2).step == 6


def test_export_says_how_much_of_the_schedule_was_done(start):
    for stop_after, epochs, steps in ((1, 1, 5), (None, 2, 10)):
        training = start(stop_after=stop_after)
        training.run()
        metadata = read_metadata(training.export("V1", []))
        assert [metadata.training[key] for key in ("epochs", "schedule_epochs", "steps")] == [epochs, 2, steps]
        assert metadata.recipe == training.recipe.model_dump(mode="json")


# --- the result --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, colours):
    """photos(classes) -> the coloured images of these classes, as a data set of PNG files."""

    def build(classes):
        for position, (image, label) in enumerate(zip(colours.images, colours.labels.tolist(), strict=True)):
            folder = tmp_path / "photos" / f"colour {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(folder / f"{position}.png")
        return build_evaluation_set(open_dataset(tmp_path / "photos"), classes, Preprocessing(16, 16, "bilinear"))

    return build


def test_export_states_what_the_file_scores(start, photos, monkeypatch):
    # Rounding so coarse that it shows.
    monkeypatch.setattr(export, "quantise", lambda state: {**quantise(state), "7.weight": state["7.weight"].round()})
    training = start(phases=(Phase(epochs=8, size=16),))
    training.run()
    images = photos(training.classes)
    path = training.export("COLOURS_V1", [images], "stopped twice")
    assert path == training.folder / "tiny-colours_v1.safetensors"
    metadata = read_metadata(path)
    assert (metadata.name, metadata.model, metadata.description) == ("COLOURS_V1", "tiny", "two short epochs")
    assert metadata.training["note"] == "stopped twice"
    assert metadata.classes == training.classes and metadata.input_size == metadata.resize_size == 16
    assert metadata.recipe == training.recipe.model_dump(mode="json")
    assert (metadata.training["steps"], metadata.training["images"], metadata.training["epochs"]) == (40, 40, 8)
    # Measured again, by other code, from the file.
    classifier = load_classifier("tiny", weights=str(path), imagenet_classes=())
    inputs, labels = images.load(range(48))
    with torch.inference_mode():
        logits = classifier.module.eval()(inputs)
        exact = training.average(inputs)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    held_out, accuracy = metadata.accuracy
    with torch.inference_mode():
        logits_held_out = classifier.module(training.held_out.images / 255)
    ours = (logits_held_out.argmax(1) == training.held_out.labels).double().mean().item()
    assert (held_out.dataset, held_out.n, held_out.top1) == (export.HELD_OUT, 8, pytest.approx(ours))
    assert held_out.dataset_sha256 == training.held_out.sha256()
    assert (accuracy.dataset, accuracy.dataset_sha256, accuracy.n) == (images.name, images.sha256, 48)
    assert accuracy.top1 == (rank == 0).double().mean().item()
    assert accuracy.top5 == (rank < 5).double().mean().item()
    assert accuracy.top1_float32 == (exact.argmax(1) == labels).double().mean().item()
    assert 0 < accuracy.top1 < accuracy.top5 <= 1 and accuracy.top1 != accuracy.top1_float32


def test_accuracy_with_fewer_than_five_classes(photos):
    images = photos(("colour 0", "colour 7", "colour 3"))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        network[2].weight.copy_(torch.tensor([-1.0, 1.0, 0.0]).view(3, 1).expand(3, 3))
        network[2].bias.copy_(torch.tensor([1.0, -1.0, -9.0]))
    # Told apart are dark and bright; the third class never comes first, and never misses the first three.
    assert accuracy_on_set(network, images) == (12 / 18, 1.0)


def test_muon_takes_the_kernels_and_resumes_on_the_same_curve(start):
    whole = start("whole", optimizer="muon")
    groups = whole.optimizer.param_groups
    names = {id(p): name for name, p in whole.network.named_parameters()}
    orthogonal = {names[id(p)] for group in groups if group["orthogonal"] for p in group["params"]}
    assert orthogonal == {"0.weight", "2.query_key.0.weight", "2.output.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)
    whole.run()
    assert whole.rows[-1]["train_loss"] < whole.rows[0]["train_loss"]

    def stop(progress):
        if progress.step == STEPS_PER_EPOCH + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start("halves", optimizer="muon").run(on_step=stop)
    resumed = start("halves", optimizer="muon")
    resumed.run()
    torch.testing.assert_close(state_of(resumed), state_of(whole), rtol=0, atol=0)


def test_goes_on_from_given_weights(start, photos, recipe, colours, tiny_lr_net, tmp_path):
    first = start("first")
    first.run()
    path = first.export("FIRST", [photos(first.classes)])
    second = Training(tiny_lr_net, recipe, colours, tmp_path / "second", initial_weights=path)
    torch.testing.assert_close(
        dict(second.average.state_dict()),
        dict(load_classifier("tiny", weights=str(path), imagenet_classes=()).module.state_dict()),
        rtol=0,
        atol=0,
    )
    second.run()
    metadata = read_metadata(second.export("SECOND", [photos(first.classes)]))
    assert metadata.training["initial_weights"]["name"] == "FIRST"
    assert len(metadata.training["initial_weights"]["sha256"]) == 64
    assert metadata.stages == ((2, 2), (2, 2)) and metadata.followed == "2 of 2 epochs, then 2 of 2"
    with pytest.raises(ConfigError, match="initial weights differ"):
        Training(tiny_lr_net, recipe, colours, tmp_path / "second")
