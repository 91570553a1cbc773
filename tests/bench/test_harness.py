import time

import pandas as pd
import pytest
import torch

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench import harness
from lrrobust.bench.harness import BARE, BREAK, HARNESS, STAND, compare_with_bare_loop
from lrrobust.errors import ConfigError

SPEC = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(2e-4, 4e-4, 1e-3), steps=4)


class Slower(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function.apply(images)


@pytest.fixture
def counted(linear_problem):
    """A linear problem, a third of it labelled wrongly; the images that each forward took."""
    problem = linear_problem(12, 2)
    labels = problem.labels.clone()
    labels[:4] = 1 - labels[:4]
    passes = []
    problem.model.register_forward_hook(lambda module, inputs, output: passes.append((len(inputs[0]), inputs[0].requires_grad)))
    return problem, labels, passes


def test_both_do_the_same_work(counted, monkeypatch):
    problem, labels, passes = counted
    found = {}
    time_interleaved = harness.time_interleaved

    def noting(ways, *, case, **options):
        for name, way in ways.items():
            del passes[:]
            found[case, name] = way().result, list(passes)
        return time_interleaved(ways, case=case, **options)

    monkeypatch.setattr(harness, "time_interleaved", noting)
    frame = pd.DataFrame(
        compare_with_bare_loop(problem.model, 2, problem.images, labels, SPEC, repeats=2, batch_size=6, chunk_size=12)
    )
    assert frame["outside"].between(0, 1).all()
    assert list(frame["case"]) == 4 * [STAND] + 4 * [BREAK] and list(frame["name"]) == 4 * [HARNESS, BARE]
    accuracies, ours = found[STAND, HARNESS]
    standing, bare = found[STAND, BARE]
    # Every image, the wrongly labelled included, at both ends of the ladder.
    assert accuracies == [1, 1] and standing == 2 * 12
    # Clean, 4 steps and the outcome at each budget, in two batches.
    assert sorted(bare) == 2 * 3 * [(6, False)] + 2 * 2 * 4 * [(6, True)]
    # Ours checks the model beside that, on one batch and on few images.
    assert [each for each in sorted(ours) if each[0] == 6] == sorted([*bare, (6, False)]) and sum(n for n, _ in ours) - sum(
        n for n, _ in bare
    ) <= 60
    accuracies, ours = found[BREAK, HARNESS]
    assert found[BREAK, BARE] == (None, ours)
    assert 1 > accuracies[0] > accuracies[-1]


def test_the_bare_loop_is_the_attack(linear_problem):
    """It breaks what is certainly within reach of its steps, and nothing that is not within the ball."""
    problem = linear_problem(12, 2)
    nearest = problem.nearest("linf")
    for eps in SPEC.eps:
        spec = SPEC.model_copy(update={"eps": (eps,)})
        standing = harness._bare_loop(*problem, spec, 5, 0)()
        assert (nearest > 1.001 * eps).sum() <= standing <= (nearest > 0.95 * eps).sum()
    assert 0 < standing < 12


def test_time_outside_the_passes_is_told_from_time_inside(linear_problem):
    problem = linear_problem(12, 2)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            time.sleep(0.1)
            return images.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.2)
            return gradient

    model = harness._Clocked(torch.nn.Sequential(Slower(Slow), problem.model))
    images = problem.images.clone().requires_grad_()

    def step():
        time.sleep(0.4)
        torch.autograd.grad(model(images).sum(), images)
        return "done"

    assert torch.equal(model(problem.images), problem.model(problem.images))
    done = model.clocked(step)()
    # Nothing of what was before, nor of what is outside.
    assert done.result == "done" and 0.3 <= done.inside_s
    started = time.perf_counter()
    again = model.clocked(step)()
    assert again.inside_s <= time.perf_counter() - started - 0.4


@pytest.mark.parametrize("change", [{"norm": "l2"}, {"restarts": 2}, {"eps": (0.0, 0.1)}])
def test_what_the_bare_loop_does_not_know_is_refused(counted, change):
    problem, labels, _ = counted
    with pytest.raises(ConfigError, match="which is what the bare loop does"):
        next(compare_with_bare_loop(problem.model, 2, problem.images, labels, SPEC.model_copy(update=change)))


def test_no_image_is_recognised(counted):
    problem, labels, _ = counted
    images = problem.images[:4]
    frame = pd.DataFrame(compare_with_bare_loop(problem.model, 2, images, 1 - problem.labels[:4], SPEC, repeats=1))
    assert len(frame) == 4 and torch.isfinite(torch.tensor(frame["wall_s"].to_numpy())).all()
