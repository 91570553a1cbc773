import numpy as np
import pytest
import torch

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench import attack_loop
from lrrobust.bench.attack_loop import BARE, BARE_STEPS, CORRECT_ONLY, OURS, USUAL, compare_attack_loops, summarise_attack_loops

SPECS = {
    "linf": PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(2e-4, 4e-4, 1e-3), steps=4),
    "l2": PgdSpec(kind="pgd", name="pgd_l2", norm="l2", eps=(2e-3, 4e-3, 1e-2), steps=4),
}


@pytest.fixture
def counted(linear_problem):
    """A linear problem, a third of it labelled wrongly; the images that each forward took."""
    problem = linear_problem(12, 2)
    labels = problem.labels.clone()
    labels[:4] = 1 - labels[:4]
    sizes = []
    problem.model.register_forward_hook(lambda module, inputs, output: sizes.append((len(inputs[0]), inputs[0].requires_grad)))
    return problem, labels, sizes


@pytest.mark.parametrize("norm", SPECS)
def test_every_way_attacks_with_the_same_budget_and_finds_the_same(norm, counted, monkeypatch):
    monkeypatch.setattr(attack_loop.importlib.util, "find_spec", lambda name: None)
    problem, labels, sizes = counted
    spec = SPECS[norm]
    frame = compare_attack_loops(problem.model, 2, problem.images, labels, spec, repeats=2, batch_size=5, chunk_size=12)
    assert list(frame["name"]) == 2 * [OURS, USUAL, CORRECT_ONLY, BARE, BARE_STEPS]
    nearest = torch.where(labels == problem.labels, problem.nearest(norm), 0)
    for eps in spec.eps:
        at_eps = frame[f"robust_accuracy_{eps:.6g}"]
        # Between the radii that the attack surely breaks and surely cannot.
        low, high = (nearest > 1.001 * eps).float().mean().item(), (nearest > 0.95 * eps).float().mean().item()
        assert at_eps[frame["name"].isin([OURS, USUAL, CORRECT_ONLY])].between(low - 1e-6, high + 1e-6).all()
        assert at_eps[frame["name"].isin([BARE, BARE_STEPS])].isna().all()
    assert 0 < frame["robust_accuracy"].min() < 1
    np.testing.assert_allclose(frame["images_per_s"] * frame["wall_s"], 12)
    assert (frame[frame["name"] == OURS]["ratio"] == 1).all()


def test_passes_are_those_that_each_way_is_about(counted, monkeypatch):
    monkeypatch.setattr(attack_loop.importlib.util, "find_spec", lambda name: None)
    problem, labels, sizes = counted
    passes = {}
    build = dict(vars(attack_loop))

    def noting(name):
        def make(*arguments, **options):
            way = build[name](*arguments, **options)

            def run():
                del sizes[:]
                result = way()
                passes.setdefault(name, []).append(sorted(sizes))
                return result

            return run

        return make

    for name in ("_ours", "_torchattacks", "_bare"):
        monkeypatch.setattr(attack_loop, name, noting(name))
    compare_attack_loops(problem.model, 2, problem.images, labels, SPECS["linf"], repeats=1, batch_size=5, chunk_size=12)
    recorded, ours = passes["_ours"]
    bare, steps = passes["_bare"]
    assert ours == recorded == bare
    assert steps == [call for call in ours if call[1]]
    _, usual, correct_only = passes["_torchattacks"]
    spent = [sum(count for count, has_gradient in calls if has_gradient) for calls in (usual, correct_only, ours)]
    assert spent[:2] == [12 * 3 * 4, 8 * 3 * 4] and 0 < spent[2] < spent[1]


def test_summary_takes_medians_and_says_what_ours_adds():
    rows = [(OURS, [2.0, 4.0, 3.0]), (BARE, [1.0, 2.0, 3.0]), (USUAL, [8.0, 4.0, 6.0])]
    ours = dict(enumerate(rows[0][1]))
    frame = attack_loop.pd.DataFrame(
        {"name": name, "repeat": repeat, "wall_s": wall_s, "ratio": wall_s / ours[repeat], "spread": 0.5}
        for name, walls in rows
        for repeat, wall_s in enumerate(walls)
    )
    summary = summarise_attack_loops(frame).set_index("name")
    assert summary.loc[USUAL, "wall_s"] == 6 and summary.loc[USUAL, "ratio"] == 2
    assert summary.loc[BARE, "overhead"] == 1 and np.isnan(summary.loc[USUAL, "overhead"])


def test_what_peers_cannot_do_is_refused(counted):
    problem, labels, _ = counted
    for change in ({"restarts": 2}, {"eps": (0.0, 0.1)}):
        with pytest.raises(ValueError, match="expected one restart and budgets above 0"):
            compare_attack_loops(problem.model, 2, problem.images, labels, SPECS["linf"].model_copy(update=change))


def test_foolbox_takes_part_when_installed(counted):
    pytest.importorskip("foolbox")
    problem, labels, _ = counted
    frame = compare_attack_loops(problem.model, 2, problem.images, labels, SPECS["linf"], repeats=1)
    accuracies = frame.set_index("name")["robust_accuracy"]
    assert accuracies[attack_loop.FOOLBOX] == pytest.approx(accuracies[USUAL], abs=0.1)
