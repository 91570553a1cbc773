"""Peers made for the test beside rows made for the test: who is counted how is known."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lrrobust.attacks.specs import CwSpec, PgdSpec
from lrrobust.crosscheck.compare import WORST_CASE, choose_peers, crosscheck
from lrrobust.crosscheck.peer import PEERS, Proposal
from lrrobust.errors import ConfigError, UnknownNameError

N = 12

#: Beyond every boundary, and still inside the box.
FAR = 0.4


class Library:
    """A peer whose attack is given, and which keeps what it was called with."""

    name, version = "library", "1.0"

    def __init__(self, attack=None, ensemble=None, import_error=None):
        self.calls, self._attack, self._ensemble, self._import_error = [], attack, ensemble, import_error

    def load(self):
        if self._import_error:
            raise self._import_error
        return SimpleNamespace(
            find_attack=lambda spec: self._recorded(self._attack), find_ensemble=lambda norm: self._recorded(self._ensemble)
        )

    def _recorded(self, attack):
        def propose(model, images, labels, eps):
            self.calls.append((images, labels, eps))
            return attack(model, images, labels, eps)

        return attack and propose


@pytest.fixture
def problem(linear_problem):
    """Twelve images, the last of which are wrong when clean, and how far each is from the boundary (linf)."""
    found = linear_problem(N, 3)
    labels = found.labels.clone()
    labels[-2:] = (labels[-2:] + 1) % 3
    return SimpleNamespace(
        model=found.model, images=found.images, labels=labels, nearest=found.nearest("linf"), is_correct=found.labels == labels
    )


def pgd(*ladder, name="pgd", **settings):
    return PgdSpec(kind="pgd", name=name, norm="linf", eps=ladder, steps=2, **settings)


def rows(ladder, is_broken, attack="pgd"):
    """Rows of our attack: is_broken(eps) -> bool (N,)."""
    return pd.DataFrame(
        {"index": 100 + i, "attack": attack, "eps": eps, "is_broken": bool(broken)}
        for eps in ladder
        for i, broken in enumerate(is_broken(eps))
    )


def compare(problem, peer, specs, ours, **options):
    return crosscheck(
        problem.model,
        3,
        problem.images,
        problem.labels,
        range(100, 100 + N),
        specs,
        ours,
        [peer],
        **{"batch_size": 4, **options},
    )


def best(model, images, labels, eps):
    """The linf attack that is optimal for a linear model: every rival class is tried."""
    weight = model[1].weight.detach()
    found, is_broken = images.clone(), torch.zeros(len(images), dtype=torch.bool)
    for rival in range(3):
        step = (weight[rival] - weight[labels]).sign().view_as(images)
        moved = images + eps * step
        success = (model(moved).argmax(1) != labels) & ~is_broken
        found[success], is_broken = moved[success], is_broken | success
    return Proposal(found.detach(), is_broken)


def test_a_peer_that_breaks_what_ours_does_leaves_no_difference(problem):
    ladder = tuple(problem.nearest[problem.is_correct].sort().values[[2, 6]].tolist())
    ladder = tuple(1.0001 * eps for eps in ladder)
    ours = rows(ladder, lambda eps: ~problem.is_correct | (problem.nearest <= eps))
    table = compare(problem, Library(best), [pgd(*ladder)], ours).table
    assert table["eps"].tolist() == list(ladder) and set(table["peer"]) == {"library"} and set(table["n"]) == {N}
    for column in ("robust_accuracy", "peer_robust_accuracy", "peer_claimed"):
        assert table[column].tolist() == pytest.approx([7 / N, 3 / N]), column
    assert not table[["only_ours", "only_peer", "difference"]].any().any()
    assert (table["p_value"] == 1).all() and (table["low"] < 0).all() and (table["high"] > 0).all()


def test_images_that_one_alone_breaks_are_counted_on_its_side(problem):
    broken_by_ours = torch.tensor(5 * [True] + 5 * [False] + 2 * [True])
    ours = rows([FAR], lambda eps: broken_by_ours)
    alone = compare(problem, Library(lambda m, x, y, eps: Proposal(x, y < 0)), [pgd(FAR)], ours).table.iloc[0]
    assert (alone["only_ours"], alone["only_peer"], alone["difference"]) == (5, 0, -5 / N)
    assert alone["p_value"] == pytest.approx(2 * 0.5**5) and alone["high"] < 0
    both = compare(problem, Library(best), [pgd(FAR)], ours).table.iloc[0]
    assert (both["only_ours"], both["only_peer"], both["difference"]) == (0, 5, 5 / N)


def test_the_judge_not_the_library_says_what_is_broken(problem):
    eps = 0.5 * problem.nearest.min().item()
    ours = rows([eps], lambda eps: ~problem.is_correct)

    def beyond(model, images, labels, eps):
        return best(model, images, labels, FAR)

    row = compare(problem, Library(beyond), [pgd(eps)], ours).table.iloc[0]
    assert row["peer_claimed"] == 0 and row["peer_robust_accuracy"] == 10 / N

    def too_modest(model, images, labels, eps):
        return Proposal(best(model, images, labels, FAR).images, torch.zeros(len(images), dtype=torch.bool))

    row = compare(problem, Library(too_modest), [pgd(FAR)], rows([FAR], lambda eps: ~problem.is_correct)).table.iloc[0]
    assert row["peer_claimed"] == 10 / N and row["peer_robust_accuracy"] == 0


def test_what_is_broken_stays_broken_and_counts_wherever_it_lies(problem):
    # Breaks everything at the second budget alone, at the distance of the first.
    ladder = (1.01 * problem.nearest[problem.is_correct].max().item(), 0.2, FAR)

    def once(model, images, labels, eps):
        found = best(model, images, labels, 0.999 * ladder[0])
        return found if eps == 0.2 else Proposal(images, torch.zeros(len(images), dtype=torch.bool))

    table = compare(problem, Library(once), [pgd(*ladder)], rows(ladder, lambda eps: ~problem.is_correct)).table
    assert table["peer_robust_accuracy"].tolist() == [0, 0, 0]
    assert table["peer_claimed"].tolist() == pytest.approx([10 / N, 0, 10 / N])


def test_minimal_norm_attacks_run_once_and_are_read_off_everywhere(problem):
    ladder = (0.0001, FAR)
    ours = pd.concat(
        [rows(ladder, lambda eps: ~problem.is_correct, "cw"), rows([math.inf], lambda eps: ~problem.is_correct, "cw")]
    )
    spec = CwSpec(kind="cw", name="cw", eps=ladder, binary_search_steps=1, steps=1, lr=0.01, initial_c=1.0)

    def shift(model, images, labels, eps):
        # In l2 now: the shortest way to the boundary, and a little farther.
        weight = model[1].weight.detach()
        rival = model(images).scatter(1, labels[:, None], -math.inf).argmax(1)
        normal = (weight[rival] - weight[labels]).double()
        logits = model(images).double()
        gap = logits.gather(1, labels[:, None]) - logits.gather(1, rival[:, None])
        moved = images + (1.01 * gap * normal / normal.square().sum(1, keepdim=True)).view_as(images)
        return Proposal(moved.float(), torch.ones(len(images), dtype=torch.bool))

    peer = Library(shift)
    table = compare(problem, peer, [spec], ours).table
    assert {eps for *_, eps in peer.calls} == {math.inf} and len(peer.calls) == 3
    assert table["peer_robust_accuracy"].tolist() == table["peer_claimed"].tolist() == pytest.approx([10 / N, 0])
    assert table["peer_wall_s"].notna().tolist() == [True, False]


def test_peers_attack_what_is_correct_in_batches_with_other_numbers_at_each_restart(problem):
    drawn = []

    def draws(model, images, labels, eps):
        drawn.append(torch.rand(()).item())
        model.train()
        return Proposal(images, labels < 0)

    peer = Library(draws)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    compare(problem, peer, [pgd(0.1, restarts=2)], rows([0.1], lambda eps: ~problem.is_correct))
    assert [len(images) for images, *_ in peer.calls] == [4, 4, 2, 4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels, _ in peer.calls[:3]]), problem.labels[problem.is_correct])
    assert len(set(drawn)) == 6
    assert torch.equal(torch.random.get_rng_state(), state) and not problem.model.training
    again = list(drawn)
    compare(problem, peer, [pgd(0.1, restarts=2)], rows([0.1], lambda eps: ~problem.is_correct))
    assert drawn == 2 * again


def test_an_ensemble_is_compared_with_the_worst_case_of_all(problem):
    first = torch.tensor(3 * [True] + 7 * [False] + 2 * [True])
    second = torch.tensor(3 * [False] + 3 * [True] + 4 * [False] + 2 * [True])
    ours = pd.concat([rows([0.2, FAR], lambda eps: first, "a"), rows([FAR], lambda eps: second, "b")])
    table = compare(problem, Library(ensemble=best), [pgd(0.2, FAR, name="a"), pgd(FAR, name="b")], ours).table
    assert table["attack"].tolist() == [WORST_CASE] and table["eps"].tolist() == [FAR]
    assert table["robust_accuracy"].tolist() == pytest.approx([4 / N]) and table["only_peer"].tolist() == [4]


def test_attacks_on_survivors_alone_are_not_compared_by_themselves(problem):
    spec = pgd(FAR).model_copy(update={"survivors_only": True})
    found = compare(problem, Library(best), [spec], rows([FAR], lambda eps: ~problem.is_correct))
    assert found.table.empty and found.notes == ("library has no counterpart of pgd",)


def test_a_crash_is_no_robustness(problem):
    def fails(model, images, labels, eps):
        raise RuntimeError("no such\nlayer")

    found = compare(problem, Library(fails), [pgd(0.1)], rows([0.1], lambda eps: ~problem.is_correct))
    assert found.table.empty and found.notes == ("library failed at pgd: RuntimeError: no such layer",)
    found = compare(
        problem, Library(import_error=ImportError("libfoo")), [pgd(0.1)], rows([0.1], lambda eps: ~problem.is_correct)
    )
    assert found.table.empty and found.notes == ("library cannot be imported: ImportError: libfoo",)
    found = compare(problem, Library(), [pgd(0.1)], rows([0.1], lambda eps: ~problem.is_correct))
    assert found.table.empty and found.notes == ("library has no counterpart of pgd",)


def test_missing_libraries_are_named_with_the_command_that_installs_them(monkeypatch):
    installed = {"torchattacks", "pyautoattack"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    peers, missing = choose_peers(())
    assert [peer.name for peer in peers] == ["autoattack", "torchattacks"]
    assert missing == ["foolbox is not installed: pip install foolbox", "adv-lib is not installed: pip install adv-lib"]
    assert choose_peers(["torchattacks", "torchattacks"]) == ([PEERS["torchattacks"]], [])
    with pytest.raises(ConfigError, match="nothing to compare with: foolbox is not installed: pip install foolbox"):
        choose_peers(["foolbox"])
    with pytest.raises(UnknownNameError, match="unknown library 'torchatacks': did you mean torchattacks"):
        choose_peers(["torchatacks"])
