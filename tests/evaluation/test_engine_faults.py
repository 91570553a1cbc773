"""The engine when memory runs out, when the model changes on the way, and with more images than fit into memory."""

import logging
import weakref

import pytest
import torch
from torch import nn

from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.errors import ModelError
from lrrobust.evaluation.engine import evaluate, plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

LADDER = (1e-4, 4e-4, 1.5e-3)
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=5)
ROUNDED = ["clean_margin", "adversarial_margin", "linf_distance", "l2_distance", "l1_distance"]


class ImagesInMemory:
    def __init__(self, images, labels):
        self.images, self.labels_tensor = images, labels
        self.labels = labels.tolist()
        self.indices = list(range(len(labels)))
        self.keys = [f"class/{i}.png" for i in self.indices]
        self.wnids = [f"n{label:08d}" for label in self.labels]

    def __len__(self):
        return len(self.labels)

    def load(self, positions):
        positions = list(positions)
        return self.images[positions].clone(), self.labels_tensor[positions].clone()


def run(model, images, folder, specs=(FGSM, PGD), chunk_size=8, batch_size=8):
    tasks = plan_tasks(specs, len(images), chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION, "fingerprint": "0123456789abcdef",
        "attacks": [spec.model_dump(mode="json") for spec in specs],
        "plan": {"parts": [list(task.part) for task in tasks]},
    }
    with RunStore.create_or_resume(folder, manifest) as store:
        evaluate(
            model, 3, images, tasks, store, fingerprint=manifest["fingerprint"], device=torch.device("cpu"), part_metadata={},
            batch_size=batch_size,
        )
    return load_run(folder)


def timeless(found):
    return found.rows.drop(columns="wall_s").reset_index(drop=True)


@pytest.fixture
def problem(linear_problem):
    return linear_problem(12, 3)


@pytest.fixture
def images(problem):
    return ImagesInMemory(problem.images, problem.labels)


class _FullInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, room):
        ctx.room = room
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > ctx.room:
            raise torch.OutOfMemoryError("tried to allocate 40 GiB")
        return gradient, None


class SmallMemory(nn.Module):
    """Has room for so many images forward, and so many backward; remembers how many it had at most."""

    def __init__(self, model, forward, backward):
        super().__init__()
        self.model, self.room, self.room_backward, self.most = model, forward, backward, 0

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("tried to allocate 40 GiB")
        self.most = max(self.most, len(images))
        return _FullInBackward.apply(self.model(images), self.room_backward)


@pytest.mark.parametrize(("forward", "backward", "used"), [(8, 8, 8), (4, 4, 4), (8, 5, 4), (3, 3, 2), (99, 1, 1), (1, 99, 1)])
def test_out_of_memory_is_done_again_in_halves(problem, images, tmp_path, caplog, forward, backward, used):
    whole = timeless(run(problem.model, images, tmp_path / "whole"))
    model = SmallMemory(problem.model, forward, backward).eval()
    with caplog.at_level(logging.WARNING):
        found = run(model, images, tmp_path / "small")
    said = [message for message in caplog.messages if "out of memory" in message]
    assert len(said) == (used < 8)
    assert found.is_complete
    rows = timeless(found)
    # Seeds are those of the images: the same up to rounding.
    assert rows.drop(columns=ROUNDED).equals(whole.drop(columns=ROUNDED))
    for column in ROUNDED:
        torch.testing.assert_close(
            torch.tensor(rows[column].to_numpy(float)), torch.tensor(whole[column].to_numpy(float)),
            rtol=1e-3, atol=1e-4, equal_nan=True,
        )
    assert {part["batch_size"] for part in found.part_metadata.values()} <= {"8", str(used)}
    assert str(used) in {part["batch_size"] for part in found.part_metadata.values()}


class Drifting(nn.Module):
    """Linear, and another after every `period` forwards: by its weights, a counter in its state, or unseen."""

    def __init__(self, model, how, period):
        super().__init__()
        self.model, self.how, self.period, self.calls, self.shift = model, how, period, 0, 0.0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images):
        logits = self.model(images)
        self.calls += 1
        if self.calls % self.period == 0:
            if self.how == "weights":
                self.model[1].weight.data += 1e-6
            elif self.how == "count":
                self.count += 1
            else:
                self.shift += 1e-2
        return logits + self.shift * torch.arange(3)


@pytest.mark.parametrize(("how", "message"), [("weights", "'model.1.weight'"), ("count", "'count'"), ("unseen", "logits of the same images")])
@pytest.mark.parametrize("period", [9, 40])
def test_a_model_that_changes_is_refused_and_nothing_of_it_is_stored(problem, images, tmp_path, how, message, period):
    whole = run(problem.model, images, tmp_path / "whole")
    with pytest.raises(ModelError, match=f"the model changes while it is evaluated: .*{message}") as caught:
        run(Drifting(problem.model, how, period).eval(), images, tmp_path / "run")
    assert "\n" not in str(caught.value)
    found = load_run(tmp_path / "run")
    assert not found.is_complete
    # What was stored before the change is what the model gives without it.
    same = timeless(whole).merge(found.rows[["index", "attack", "eps"]])
    assert timeless(found).equals(same.astype(found.rows.drop(columns="wall_s").dtypes))


def test_a_randomised_model_is_marked_only(problem, images, tmp_path):
    class Randomised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = problem.model
            self.register_buffer("count", torch.zeros(()))

        def forward(self, images):
            self.count += 1
            return self.model(images) + 0.01 * torch.randn(len(images), 3)

    found = run(Randomised().eval(), images, tmp_path)
    assert found.is_complete and all("randomised" in part for part in found.part_metadata.values())


class CountedImages(ImagesInMemory):
    """Knows how many of the images that it has handed out are still in memory."""

    def __init__(self, images, labels):
        super().__init__(images, labels)
        self.alive, self.most = 0, 0

    def load(self, positions):
        pixels, labels = super().load(positions)
        count = len(pixels)
        self.alive += count
        self.most = max(self.most, self.alive)
        weakref.finalize(pixels.untyped_storage(), self._gone, count)
        return pixels, labels

    def _gone(self, count):
        self.alive -= count


def test_two_chunks_of_images_are_in_memory_at_most(problem, tmp_path):
    images = CountedImages(problem.images.repeat(20, 1, 1, 1), problem.labels.repeat(20))
    assert run(problem.model, images, tmp_path, specs=[FGSM], chunk_size=4).is_complete
    assert len(images) == 240 and 4 < images.most <= 8
