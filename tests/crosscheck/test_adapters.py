"""What each adapter asks its library for: of the real one where it is installed, else of a stand-in with its signatures."""

import importlib
import importlib.util
import math
import sys
import warnings
from types import ModuleType

import pytest
import torch

from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import CwSpec, FabSpec, FgsmSpec, FmnSpec, PgdSpec
from lrrobust.crosscheck.peer import PEERS
from lrrobust.threat import TOLERANCE, distance

EPS = 0.06
PGD = {norm: PgdSpec(kind="pgd", name="pgd", norm=norm, eps=(EPS,), steps=5, step_size_ratio=2.0) for norm in ("linf", "l2")}
FGSM = FgsmSpec(kind="fgsm", name="fgsm", eps=(EPS,))
CW = CwSpec(kind="cw", name="cw", eps=(0.5,), binary_search_steps=3, steps=20, lr=0.02, initial_c=1.5, confidence=0.1)
FAB = FabSpec(kind="fab_t", name="fab_t", norm="l2", eps=(0.5,), targets=3, steps=30)
FMN = FmnSpec(kind="fmn", name="fmn", norm="linf", eps=(0.1,), steps=30)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module under the name of a library, and imports the adapter with it."""

    def load(peer, name, **contents):
        fake = ModuleType(name)
        fake.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
        adapter = f"lrrobust.crosscheck.{PEERS[peer].adapter}"
        monkeypatch.delitem(sys.modules, adapter, raising=False)
        loaded = PEERS[peer].load()
        # Whoever comes next gets the library that is there.
        monkeypatch.setitem(sys.modules, adapter, loaded)
        return loaded

    return load


@pytest.fixture
def attacked(small_cnn):
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = small_cnn(images).argmax(1)
    return small_cnn.requires_grad_(False), images, labels


def real(name):
    """The adapter of a library, where that is installed."""
    if PEERS[name].why_not() is not None:
        pytest.skip(PEERS[name].why_not())
    with warnings.catch_warnings():
        # Libraries that lag behind theirs, on which ours does not depend.
        warnings.simplefilter("ignore", DeprecationWarning)
        return PEERS[name].load()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("spec", [FGSM, *PGD.values()], ids=["fgsm", "pgd-linf", "pgd-l2"])
def test_proposals_keep_to_the_budget_and_claims_to_the_model(name, spec, attacked):
    propose = real(name).find_attack(spec)
    if propose is None:
        pytest.skip(f"{name} has no counterpart")
    model, images, labels = attacked
    eps = EPS if spec.norm == "linf" else 1.0
    torch.manual_seed(0)
    found = propose(model, images.clone(), labels, eps)
    assert found.images.shape == images.shape and (found.images >= 0).all() and (found.images <= 1).all()
    assert (distance(images, found.images, spec.norm) <= eps + TOLERANCE).all()
    assert torch.equal(found.is_claimed, model(found.images).argmax(1) != labels) and found.is_claimed.any()


@pytest.mark.parametrize("name", ["foolbox", "adv-lib"])
def test_minimal_norm_attacks_find_near_images(name, attacked):
    model, images, labels = attacked
    found = real(name).find_attack(CW)(model, images.clone(), labels, math.inf)
    assert torch.equal(found.is_claimed, model(found.images).argmax(1) != labels)
    lengths = distance(images, found.images, "l2")
    assert ((lengths > 0) & (lengths < 2) & found.is_claimed).sum() >= 3


@pytest.mark.parametrize("spec", [FAB, FMN], ids=lambda spec: spec.name)
def test_adv_lib_finds_images_about_as_near_as_ours(spec, attacked):
    model, images, labels = attacked
    found = real("adv-lib").find_attack(spec)(model, images.clone(), labels, math.inf)
    nearest = images.clone()

    def claim(rows, proposed, eps, is_last):
        nearest[rows] = proposed
        return [True] * len(rows)

    Attack(spec)(model, images, labels, batch_size=6, claim=claim, draw=None)
    ours, theirs = (distance(images, each, spec.norm) for each in (nearest, found.images))
    assert found.is_claimed.all() and (ours <= 1.05 * theirs).all()


def test_pgd_of_our_own_kind_has_no_counterpart(stand_in, monkeypatch):
    attacks = ModuleType("adv_lib.attacks")
    attacks.pgd_linf = print
    monkeypatch.setitem(sys.modules, "adv_lib.attacks", attacks)
    adapters = [real("torchattacks"), stand_in("adv-lib", "adv_lib", attacks=attacks)]
    for adapter in adapters:
        assert adapter.find_attack(PGD["linf"]) is not None
        for change in ({"target": "top_k"}, {"target": 3}, {"warm_start": True}, {"norm": "l1"}):
            assert adapter.find_attack(PGD["linf"].model_copy(update=change)) is None


def test_autoattack_runs_its_standard_evaluation(linear_problem):
    adapter = real("autoattack")
    problem = linear_problem(4, 10)
    # What falls to its first attack does not meet the 5000 queries of the last.
    eps = 2 * problem.nearest("linf").max().item()
    torch.manual_seed(0)
    found = adapter.find_ensemble("linf")(problem.model.requires_grad_(False), problem.images, problem.labels, eps)
    assert found.is_claimed.all() and not torch.equal(found.images, problem.images)
    assert distance(problem.images, found.images, "linf").max() <= eps + TOLERANCE


class Recorded:
    """A class or function of a library that keeps what it was given."""

    def __init__(self, answer):
        self.given, self.answer = [], answer

    def __call__(self, *arguments, **settings):
        self.given.append((arguments, settings))
        return self.answer(*arguments, **settings)


def test_torchattacks_gets_the_settings_of_the_attack(attacked, monkeypatch):
    adapter = real("torchattacks")
    model, images, labels = attacked
    linf, l2 = (adapter.build_pgd(model, spec, EPS) for spec in PGD.values())
    for attack in (linf, l2):
        assert (attack.eps, attack.alpha, attack.steps, attack.random_start) == (EPS, 2 * EPS / 5, 5, True)
    assert (linf.attack, l2.attack) == ("PGD", "PGDL2")
    made = Recorded(lambda model, **_: lambda images, labels: images)
    monkeypatch.setattr(adapter.torchattacks, "CW", made)
    adapter.find_attack(CW)(model, images, labels, math.inf)
    assert made.given == [((model,), {"c": 1.5, "kappa": 0.1, "steps": 20, "lr": 0.02})]
    assert adapter.find_ensemble("linf") is None


def test_foolbox_gets_the_settings_of_the_attack(stand_in, attacked):
    model, images, labels = attacked
    names = ("LinfFastGradientAttack", "LinfPGD", "L2PGD", "L2CarliniWagnerAttack")
    made = {name: Recorded(lambda **settings: attack) for name in names}
    attack = Recorded(lambda victim, x, y, epsilons: (None, x + 0.5, y >= 0))
    attacks = ModuleType("foolbox.attacks")
    vars(attacks).update(made)
    adapter = stand_in("foolbox", "foolbox", attacks=attacks, PyTorchModel=lambda model, bounds, device: ("victim", bounds))

    for spec in (FGSM, *PGD.values()):
        proposal = adapter.find_attack(spec)(model, images, labels, EPS)
        assert torch.equal(proposal.images, images + 0.5) and proposal.is_claimed.all()
    adapter.find_attack(CW)(model, images, labels, math.inf)
    assert [settings["epsilons"] for _, settings in attack.given] == [EPS, EPS, EPS, None]
    assert attack.given[0][0][0] == ("victim", (0, 1))
    assert made["LinfPGD"].given == made["L2PGD"].given == [((), {"rel_stepsize": 0.4, "steps": 5, "random_start": True})]
    assert made["LinfFastGradientAttack"].given == [((), {})]
    assert made["L2CarliniWagnerAttack"].given[0][1] == {
        "binary_search_steps": 3,
        "steps": 20,
        "stepsize": 0.02,
        "initial_const": 1.5,
        "confidence": 0.1,
        "abort_early": True,
    }


def test_adv_lib_gets_the_settings_of_the_attack(stand_in, attacked, monkeypatch):
    model, images, labels = attacked
    attacks = ModuleType("adv_lib.attacks")
    for name in ("pgd_linf", "carlini_wagner_l2", "fab", "fmn"):
        setattr(attacks, name, Recorded(lambda model, x, *_, **__: x))
    monkeypatch.setitem(sys.modules, "adv_lib.attacks", attacks)
    adapter = stand_in("adv-lib", "adv_lib", attacks=attacks)
    assert adapter.find_attack(FGSM) is None and adapter.find_attack(PGD["l2"]) is None
    proposal = adapter.find_attack(PGD["linf"])(model, images, labels, EPS)
    assert not proposal.is_claimed.any()
    adapter.find_attack(CW)(model, images, labels, math.inf)
    ((arguments, settings),) = attacks.pgd_linf.given
    assert arguments[3] == EPS
    assert settings == {"steps": 5, "random_init": True, "relative_step_size": 0.4}
    assert attacks.carlini_wagner_l2.given[0][1] == {
        "confidence": 0.1,
        "learning_rate": 0.02,
        "initial_const": 1.5,
        "binary_search_steps": 3,
        "max_iterations": 20,
        "abort_early": True,
    }
    for spec in (FAB, FMN):
        assert not adapter.find_attack(spec)(model, images, labels, math.inf).is_claimed.any()
    assert attacks.fab.given[0][1] == {
        "norm": 2,
        "n_iter": 30,
        "alpha_max": 0.1,
        "eta": 1.05,
        "beta": 0.9,
        "restarts": 3,
        "targeted_restarts": True,
    }
    assert attacks.fmn.given[0][1] == {"norm": math.inf, "steps": 30, "γ_init": 0.05, "γ_final": 0.001}


@pytest.mark.parametrize("is_original", [True, False])
def test_autoattack_is_asked_as_each_package_wants_it(is_original, stand_in, attacked, monkeypatch):
    model, images, labels = attacked
    name = "autoattack" if is_original else "pyautoattack"
    monkeypatch.setattr("importlib.util.find_spec", lambda asked, package=None: asked if asked == name else None)
    evaluation = ModuleType("evaluation")
    evaluation.run_standard_evaluation = Recorded(lambda x, y, **_: (x, torch.zeros_like(y)))
    made = Recorded(lambda model, **_: evaluation)
    adapter = stand_in("autoattack", name, AutoAttack=made)
    assert adapter.find_attack(PGD["linf"]) is None
    proposal = adapter.find_ensemble("l2")(model, images, labels, EPS)
    assert torch.equal(proposal.is_claimed, labels != 0)
    settings = made.given[0][1]
    assert isinstance(settings.pop("seed"), int)
    assert settings == {"norm": "L2", "eps": EPS, "version": "standard", "device": "cpu"} | (
        {"verbose": False} if is_original else {}
    )
    asked = evaluation.run_standard_evaluation.given[0][1]
    assert asked == ({"bs": 6, "return_labels": True} if is_original else {"batch_size": 6})
