"""The engine when memory runs out, when the model changes on the way, and with more images than fit into memory."""

import logging
import weakref

import pytest
import torch
from torch import nn

from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.errors import ModelError
from lrrobust.results import load_run

LADDER = (1e-4, 4e-4, 1.5e-3)
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=5)
ROUNDED = ["clean_margin", "adversarial_margin", "linf_distance", "l2_distance", "l1_distance"]


@pytest.fixture
def evaluate_in(run):
    """Evaluates a model on images in memory under two attacks, as far as it comes; the run as it is loaded."""

    def evaluate_in(folder, model, images, specs=(FGSM, PGD), chunk_size=8):
        run(model, 3, images, specs, folder, chunk_size=chunk_size, batch_size=8)
        return load_run(folder)

    return evaluate_in


def timeless(found):
    return found.rows.drop(columns="wall_s").reset_index(drop=True)


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
def test_out_of_memory_is_done_again_in_halves(problem, images, tmp_path, caplog, forward, backward, used, evaluate_in):
    whole = timeless(evaluate_in(tmp_path / "whole", problem.model, images))
    model = SmallMemory(problem.model, forward, backward).eval()
    with caplog.at_level(logging.WARNING):
        found = evaluate_in(tmp_path / "small", model, images)
    said = [message for message in caplog.messages if "out of memory" in message]
    assert len(said) == (used < 8)
    assert found.is_complete
    rows = timeless(found)
    # Seeds are those of the images: the same up to rounding.
    assert rows.drop(columns=ROUNDED).equals(whole.drop(columns=ROUNDED))
    for column in ROUNDED:
        torch.testing.assert_close(
            torch.tensor(rows[column].to_numpy(float)),
            torch.tensor(whole[column].to_numpy(float)),
            rtol=1e-3,
            atol=1e-4,
            equal_nan=True,
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


@pytest.mark.parametrize(
    ("how", "message"), [("weights", "'model.1.weight'"), ("count", "'count'"), ("unseen", "logits of the same images")]
)
@pytest.mark.parametrize("period", [17, 40])
def test_a_model_that_changes_is_refused_and_nothing_of_it_is_stored(
    problem, images, tmp_path, how, message, period, evaluate_in
):
    whole = evaluate_in(tmp_path / "whole", problem.model, images)
    with pytest.raises(ModelError, match=f"the model changes while it is evaluated: .*{message}") as caught:
        evaluate_in(tmp_path / "run", Drifting(problem.model, how, period).eval(), images)
    assert "\n" not in str(caught.value)
    found = load_run(tmp_path / "run")
    assert not found.is_complete
    # What was stored before the change is what the model gives without it.
    same = timeless(whole).merge(found.rows[["index", "attack", "eps"]])
    assert timeless(found).equals(same.astype(found.rows.drop(columns="wall_s").dtypes))


def test_a_randomised_model_is_marked_only(problem, images, tmp_path, evaluate_in):
    class Randomised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = problem.model
            self.register_buffer("count", torch.zeros(()))

        def forward(self, images):
            self.count += 1
            return self.model(images) + 0.01 * torch.randn(len(images), 3)

    found = evaluate_in(tmp_path, Randomised().eval(), images)
    assert found.is_complete and all("randomised" in part for part in found.part_metadata.values())


def test_two_chunks_of_images_are_in_memory_at_most(problem, tmp_path, evaluate_in, in_memory):
    class CountedImages(in_memory):
        """Knows how many of the images that it has handed out are still in memory."""

        alive = most = 0

        def load(self, positions):
            pixels, labels = super().load(positions)
            self.alive += len(pixels)
            self.most = max(self.most, self.alive)
            weakref.finalize(pixels.untyped_storage(), self.forget, len(pixels))
            return pixels, labels

        def forget(self, count):
            self.alive -= count

    images = CountedImages(problem.images.repeat(20, 1, 1, 1), problem.labels.repeat(20))
    assert evaluate_in(tmp_path, problem.model, images, specs=[FGSM], chunk_size=4).is_complete
    assert len(images) == 240 and 4 < images.most <= 8
