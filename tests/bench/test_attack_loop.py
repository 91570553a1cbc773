from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench import attack_loop
from lrrobust.bench.attack_loop import CORRECT_ONLY, OURS, USUAL, compare_attack_loops, summarise_attack_loops
from lrrobust.errors import ConfigError

SPECS = {
    "linf": PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(2e-4, 4e-4, 1e-3), steps=4),
    "l2": PgdSpec(kind="pgd", name="pgd_l2", norm="l2", eps=(2e-3, 4e-3, 1e-2), steps=4),
}


@pytest.fixture
def problem(linear_problem):
    """A linear problem, and labels a third of which are wrong."""
    made = linear_problem(12, 2)
    labels = made.labels.clone()
    labels[:4] = 1 - labels[:4]
    return made, labels


@pytest.fixture
def without_foolbox(monkeypatch):
    monkeypatch.setattr(attack_loop.importlib.util, "find_spec", lambda name: None)


def compared(problem, spec=SPECS["linf"], **options):
    made, labels = problem
    options = {"repeats": 2, "batch_size": 5, "chunk_size": 12, **options}
    return compare_attack_loops(made.model, 2, made.images, labels, spec, **options)


@pytest.mark.parametrize("norm", SPECS)
def test_every_way_attacks_with_the_same_budget_and_finds_the_same(norm, problem, without_foolbox):
    made, labels = problem
    spec = SPECS[norm]
    frame = pd.DataFrame(compared(problem, spec))
    assert list(frame["name"]) == 2 * [OURS, USUAL, CORRECT_ONLY]
    nearest = torch.where(labels == made.labels, made.nearest(norm), 0)
    for eps in spec.eps:
        # Between the radii that the attack surely breaks and surely cannot.
        low, high = (nearest > 1.001 * eps).float().mean().item(), (nearest > 0.95 * eps).float().mean().item()
        assert frame[f"robust_accuracy_{eps:.6g}"].between(low - 1e-6, high + 1e-6).all()
    assert 0 < frame["robust_accuracy"].min() < 1
    np.testing.assert_allclose(frame["images_per_s"] * frame["wall_s"], 12)


def test_no_way_has_batch_normalisation_learn_of_the_attacked(problem, without_foolbox):
    made, labels = problem
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), made.model).eval()
    assert len(list(compared((replace(made, model=model), labels)))) == 6
    assert not model.training and not model[0].training and model[0].num_batches_tracked == 0


def test_each_way_takes_the_gradients_that_it_is_about(problem, without_foolbox):
    made, labels = problem
    taken = []
    made.model.register_forward_hook(lambda module, inputs, output: taken.append(len(inputs[0]) * inputs[0].requires_grad))
    frame = pd.DataFrame(compared(problem))
    gradients = frame.groupby("name").gradients.agg(set)
    assert gradients[USUAL] == {12 * 3 * 4} and gradients[CORRECT_ONLY] == {8 * 3 * 4}
    (ours,) = gradients[OURS]
    assert 0 < ours < 8 * 3 * 4
    # Beside them the warm-ups: one step on one batch, of five images of which the first four are wrong, and the check of the
    # model on four, as they are and with noise.
    assert sum(taken) == 2 * (ours + 12 * 3 * 4 + 8 * 3 * 4) + (1 + 4 + 4) + 5 + 1


def test_one_that_ran_out_of_memory_leaves_the_next_no_gradients(problem, monkeypatch, without_foolbox):
    build, rounds = attack_loop._torchattacks, []

    def greedy(*arguments, is_correct_only=False):
        run = build(*arguments, is_correct_only=is_correct_only)

        def run_out():
            found = run()
            rounds.append(1)
            if len(rounds) > 1:  # the first warms up
                raise torch.OutOfMemoryError("tried to allocate 140 GiB")
            return found

        return run if is_correct_only else run_out

    monkeypatch.setattr(attack_loop, "_torchattacks", greedy)
    frame = pd.DataFrame(compared(problem))
    assert set(frame["name"]) == {OURS, CORRECT_ONLY}
    assert set(frame[frame["name"] == CORRECT_ONLY].gradients) == {8 * 3 * 4}


def test_summary_keeps_what_was_found():
    rows = [(OURS, [2.0, 4.0, 3.0]), (USUAL, [8.0, 4.0, 6.0])]
    frame = pd.DataFrame(
        {"model": "m", "name": name, "repeat": r, "wall_s": w, "cpu_s": w, "gradients": 5, "robust_accuracy": 0.25}
        for name, walls in rows
        for r, w in enumerate(walls)
    )
    summary = summarise_attack_loops(frame, ["model"]).set_index("name")
    assert summary.loc[USUAL, "median_s"] == 6 and summary.loc[USUAL, "ratio"] == 2
    assert set(summary.gradients) == {5} and set(summary.robust_accuracy) == {0.25}
    assert not {"repeat", "wall_s", "cpu_s"} & set(summary.columns)


def test_what_peers_cannot_do_is_refused(problem):
    for change in ({"restarts": 2}, {"eps": (0.0, 0.1)}):
        with pytest.raises(ConfigError, match="expected one restart and budgets above 0"):
            next(compared(problem, SPECS["linf"].model_copy(update=change)))


def test_foolbox_takes_part_when_installed(problem):
    pytest.importorskip("foolbox")
    frame = pd.DataFrame(compared(problem, repeats=1))
    accuracies = frame.set_index("name")["robust_accuracy"]
    assert accuracies[attack_loop.FOOLBOX] == pytest.approx(accuracies[USUAL], abs=0.1)
