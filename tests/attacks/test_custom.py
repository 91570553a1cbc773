"""Functions of one's own as attacks: what is proposed is judged; what is no proposal is refused."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import lrrobust
from lrrobust.attacks.suite import load_suite
from lrrobust.cli import run
from lrrobust.errors import ConfigError
from lrrobust.results import find_runs, load_run


def straight(model, images, labels, eps, share=1.0):
    """Towards the nearest other class of a linear model, `share` of eps far in linf."""
    with torch.enable_grad():
        images = images.clone().requires_grad_()
        logits = model(images)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        weight = model_layer(model).weight
        others = logits.scatter(1, labels[:, None], -torch.inf)
        lengths = (weight[labels][:, None] - weight[None]).abs().sum(2)
        nearest = ((own[:, None] - others) / lengths).argmin(1)
        (gradient,) = torch.autograd.grad((logits.gather(1, nearest[:, None]).squeeze(1) - own).sum(), images)
    return (images + share * eps * gradient.sign()).detach()


def model_layer(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.Linear))


def evaluate(problem, *attacks, **options):
    options = {"diagnostics": False, "progress": False} | options
    return lrrobust.evaluate(*problem, attacks=list(attacks), **options)


@pytest.fixture
def problem(linear_problem):
    return linear_problem(count=30, classes=4)


def test_breaks_what_lies_within_eps_in_closed_form(problem):
    distances = problem.nearest("linf")
    budgets = [float(distances.quantile(q)) for q in (0.2, 0.5, 0.8)]
    found = evaluate(problem, lrrobust.CustomAttack(straight, "linf", budgets))
    assert set(found.rows["attack"]) == {"straight"}
    for budget in budgets:
        rows = found.rows[found.rows["eps"].astype(float).sub(budget).abs() < 1e-9].sort_values("index")
        is_near = torch.tensor((distances - budget).abs().tolist()) < 1e-4 * budget
        is_broken = torch.tensor(rows["is_broken"].tolist())
        assert torch.equal(is_broken[~is_near], (distances < budget)[~is_near]) and is_broken.any()


def test_images_outside_of_the_ball_break_nothing(problem):
    eps = [float(problem.nearest("linf").quantile(0.5))]
    found = evaluate(problem, lrrobust.CustomAttack(partial(straight, share=1.01), "linf", eps, name="too_far"))
    assert not found.rows["is_broken"].any() and set(found.rows["outcome"]) == {"rejected", "robust"}
    assert any("too_far last proposed something outside of ball" in warning for warning in found.warnings)


def test_passes_are_counted_and_broken_images_are_left_alone_at_larger_budgets(problem):
    distances = problem.nearest("linf")
    budgets = [0.0, float(distances.quantile(0.5)), float(distances.max()) * 1.1]
    seen = []

    def watched(model, images, labels, eps):
        seen.append((eps, len(images)))
        return straight(model, images, labels, eps)

    found = evaluate(problem, lrrobust.CustomAttack(watched, "linf", budgets), batch_size=30)
    left = int((~found.rows[found.rows["eps"] == budgets[1]]["is_broken"].astype(bool)).sum())
    assert seen == [(budgets[1], 30), (budgets[2], left)] and 0 < left < 30
    assert found.rows["forward_passes"].sum() == found.rows["backward_passes"].sum() == 30 + left


def test_random_numbers_are_seeded(problem):
    def drawn(model, images, labels, eps):
        return (images + eps * torch.randn_like(images).sign()).clamp(0, 1)

    first, second, other = (
        evaluate(problem, lrrobust.CustomAttack(drawn, "linf", [0.05]), seed=seed).rows["adversarial_margin"]
        for seed in (0, 0, 1)
    )
    assert first.equals(second) and not first.equals(other)


def test_the_code_of_the_function_identifies_a_run(problem, tmp_path):
    def made(share):
        return lambda model, images, labels, eps: straight(model, images, labels, eps, share)

    kept = {"out": tmp_path}
    folders = [
        evaluate(problem, lrrobust.CustomAttack(made(share), "linf", [0.01], name="mine"), **kept).folder
        for share in (1.0, 1.0, 0.5)
    ]
    assert folders[0] == folders[1] != folders[2]
    # How long it is thought to take changes nothing.
    again = lrrobust.CustomAttack(made(1.0), "linf", ["0.01"], name="mine", passes=7)
    assert evaluate(problem, again, **kept).folder == folders[0]


def test_settings_are_replaced_as_those_of_other_attacks(problem):
    (spec,) = load_suite([lrrobust.CustomAttack(straight, "l2", [0.1], passes=3)], eps=["1/4", 0.5], eot_iter=2)
    assert (spec.eps, spec.eot_iter, spec.norm, spec.passes, spec.propose) == ((0.25, 0.5), 2, "l2", 3, straight)


def test_checks_make_attacks_by_gradients_beside_it(problem):
    def idle(model, images, labels, eps):
        return images

    eps = [float(problem.nearest("linf").quantile(0.5)) * 1.2]
    checks = evaluate(problem, lrrobust.CustomAttack(idle, "linf", eps), diagnostics=True).checks.set_index("name")
    assert checks.loc["convergence", "passed"] is False or not checks.loc["convergence", "passed"]
    assert "see no gradients" not in checks.loc["convergence", "detail"]
    assert checks.loc["finite_differences", "passed"]
    assert "black-box search" in checks.loc["black_box", "detail"]
    # Beside one by gradients it is no black-box attack that must not beat it.
    found = evaluate(problem, "fgsm", lrrobust.CustomAttack(straight, "linf", eps), diagnostics=True).checks
    assert "straight" not in set(found[found["name"] == "black_box"]["attack"])


def test_checks_of_one_on_a_model_without_gradients_say_that_they_do_not_know(problem):
    problem.model.register_forward_hook(lambda layer, given, logits: logits.detach())
    attack = lrrobust.CustomAttack(lambda model, images, labels, eps: images, "linf", [0.1], name="idle")
    passed = evaluate(problem, attack, diagnostics=True).checks.set_index("name")["passed"]
    assert passed["convergence"] is passed["large_eps"] is None


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: lrrobust.CustomAttack(lambda *_: None, "linf", [0.1]), "custom attack '<lambda>': name: expected a name"),
        (lambda: lrrobust.CustomAttack(3, "linf", [0.1]), "propose: expected a function, found int"),
        (lambda: lrrobust.CustomAttack(straight, "l7", [0.1]), "custom attack 'straight': norm: expected 'linf', 'l2' or 'l1'"),
        (lambda: lrrobust.CustomAttack(straight, "linf", None), "eps: expected budgets such as"),
        (lambda: lrrobust.CustomAttack(straight, "linf", ["8/0"]), "'straight': eps: expected a number or a fraction"),
        (lambda: lrrobust.CustomAttack(straight, "linf", [0.2, 0.1]), "eps: expected budgets in ascending order"),
        (lambda: lrrobust.CustomAttack(straight, "linf", [8]), "eps: expected budgets of at most 1"),
        (lambda: lrrobust.CustomAttack(straight, "linf", [0.1], passes=0), "passes: expected at least 1"),
        (lambda: lrrobust.CustomAttack(straight, "linf", [0.1], name="pgd"), "'pgd': expected a name that no other attack has"),
        (lambda: lrrobust.CustomAttack(lambda *_: 0, "linf", [0.1], name="none"), "none: expected a tensor .* returned int"),
        (
            lambda: lrrobust.CustomAttack(lambda m, x, y, e: x[:1], "linf", [0.1], name="one"),
            r"one: expected .*\(30, 3, .* returned \(1,",
        ),
        (
            lambda: lrrobust.CustomAttack(lambda m, x, y, e: x.byte(), "linf", [0.1], name="byte"),
            "of floats, returned .* torch.uint8",
        ),
    ],
)
def test_what_is_no_attack_is_refused_in_one_line(problem, made, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(problem, made())


def test_two_of_one_name_are_refused(problem):
    attack = lrrobust.CustomAttack(straight, "linf", [0.1])
    with pytest.raises(ConfigError, match="'straight': expected a name that no other attack has"):
        evaluate(problem, attack, attack)


def test_no_file_can_name_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: custom\nnorm: linf\neps: [0.1]\npropose: os.system\n")
    with pytest.raises(ConfigError, match="kind: expected one of .*, found 'custom'"):
        load_suite([path])


def test_readme_shows_one_that_runs(problem):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "CustomAttack(" in block]
    named = {"lrrobust": lrrobust, "torch": torch, "model": problem.model, "images": problem.images, "labels": problem.labels}
    exec(block, named)
    assert {"pgd", "jitter"} <= set(named["found"].rows["attack"])


FILE = """
import lrrobust
from beside import SHARE

def propose(model, images, labels, eps):
    return (images + SHARE * eps).clamp(0, 1)

mine = lrrobust.CustomAttack(propose, "linf", ["1/255", 0.1], name="brighter")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "beside.py").write_text("SHARE = 0.5\n")
    (tmp_path / "own" / "mine.py").write_text(FILE)
    return "own/mine.py"


def test_one_in_a_file_is_known_by_all_of_the_file(file):
    (first,), (again,) = (load_suite([f"{file}:mine"]) for _ in range(2))
    assert (first.name, first.eps) == ("brighter", (1 / 255, 0.1)) and first.code_sha256 == again.code_sha256
    torch.testing.assert_close(first.propose(None, torch.zeros(2, 3, 2, 2), None, 0.1), torch.full((2, 3, 2, 2), 0.05))
    Path(file).write_text(FILE + "\n# another\n")
    assert load_suite([f"{file}:mine"])[0].code_sha256 != first.code_sha256
    assert "beside" not in sys.modules


def test_one_in_a_file_is_evaluated_from_the_command_line(file, tmp_path):
    images = tmp_path / "images"
    for place, name in enumerate(("cat", "dog")):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (40 + 100 * place,) * 3).save(images / name / "x.png")
    (tmp_path / "model.py").write_text(
        "import torch\nfrom lrrobust.models import Classifier\n\n"
        "class Bright(torch.nn.Module):\n    def forward(self, images):\n"
        "        level = images.mean((1, 2, 3)) - 0.45\n        return torch.stack([-level, level], 1)\n\n"
        "def build():\n    return Classifier(Bright(), ('cat', 'dog'), 32)\n"
    )
    arguments = ["eval", "--model", "model.py:build", "--dataset", str(images), "--attack", f"{file}:mine", "--no-diagnostics"]
    assert run([*arguments, "--eps", "0.3", "--eps", "0.7"]) == 0
    (found,) = find_runs(Path("reports/runs"))
    rows = load_run(found).rows.sort_values(["eps", "index"])
    # The cat is 0.293 from the boundary, of which half of eps reaches 0.35; brightening takes no dog to the cats.
    assert rows["is_broken"].tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.py:mine", "no file none.py: expected path/to/file.py:attack"),
        ("own/mine.py:other", "own/mine.py:other: expected a lrrobust.CustomAttack of this name, found nothing"),
        ("own/mine.py:propose", "expected a lrrobust.CustomAttack of this name, found function"),
        ("own/broken.py:mine", "own/broken.py, line 2 failed with ZeroDivisionError: division by zero"),
    ],
)
def test_files_without_an_attack_are_refused(file, name, message):
    Path("own/broken.py").write_text("one = 1\none / 0\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_suite([name])


def test_no_suite_runs_a_file(file):
    Path("suite.yaml").write_text(f"kind: suite\nattacks: ['{file}:mine']\n")
    with pytest.raises(ConfigError, match="suite.yaml: attacks: .*mine.py:mine.: no suite runs a Python file"):
        load_suite(["suite.yaml"])
