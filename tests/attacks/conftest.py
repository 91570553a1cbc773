from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lrrobust.attacks.build import Attack, Effort
from lrrobust.evaluation.chunks import start_seed
from lrrobust.evaluation.judge import Judge
from lrrobust.threat import ThreatModel, distance, is_in_box


@pytest.fixture(scope="package")
def trained():
    """A small network after a few steps on noisy patterns, and 200 images of which it gets nearly all right."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(5, 3, 8, 8, generator=generator)

    def sample(count):
        labels = torch.randint(5, (count,), generator=generator)
        noise = torch.rand(count, 3, 8, 8, generator=generator)
        return (0.3 * patterns[labels] + 0.7 * noise), labels

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 5),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(120):
            images, labels = sample(32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    images, labels = sample(200)
    with torch.no_grad():
        assert 0.9 < (model.eval()(images).argmax(1) == labels).float().mean() <= 1
    return model, images, labels


@pytest.fixture(scope="package")
def in_double(trained):
    """`trained` in float64, where rounding decides next to nothing."""
    model, images, labels = trained
    return deepcopy(model).double(), images.double(), labels


@dataclass
class Attacked:
    """What came of an attack: everything it claimed, and what the judge made of it."""

    effort: Effort
    proposals: torch.Tensor  # (L, N, C, H, W): what broke the image at a budget, else the last proposal, else the image
    is_broken: torch.Tensor  # (L, N): by a claim at this budget or a smaller one
    claims: list[tuple[int, float, bool, bool]] = field(default_factory=list)  # row, eps, is_last, is_adversarial


@pytest.fixture
def attack_with():
    """Runs a spec against a model as the engine does, every claim judged by the judge."""

    def run(spec, model, images, labels, *, batch_size=32, seed="", names=None):
        attack = Attack(spec)
        names = range(len(images)) if names is None else names
        shape = (len(attack.ladder), len(images))
        with torch.inference_mode(False):
            proposals = torch.zeros(shape[0], *images.shape, dtype=images.dtype)
            attacked = Attacked(None, proposals, torch.zeros(shape, dtype=torch.bool))
        attacked.proposals.copy_(images)
        with torch.no_grad():
            classes = model(images).shape[1] if len(images) else 1

        def claim(rows, proposed, eps, is_last):
            assert len(rows) == len(set(rows)) == len(proposed) == len(eps) == len(is_last) <= batch_size
            assert proposed.dtype == images.dtype and not proposed.requires_grad and not proposed.is_inference()
            threat = ThreatModel(spec.norm, torch.tensor(eps, dtype=torch.float64))
            verdict = Judge(model, classes).judge(images[rows], labels[rows], proposed, threat, [""] * len(rows))
            levels = [attack.ladder.index(each) for each in eps]
            assert not attacked.is_broken[levels, rows].any(), "a broken image was attacked"
            attacked.proposals[levels, rows] = proposed
            for row, level, is_adversarial in zip(rows, levels, verdict.is_adversarial.tolist(), strict=True):
                attacked.is_broken[level:, row] |= is_adversarial
            attacked.claims += zip(rows, eps, is_last, verdict.is_adversarial.tolist(), strict=True)
            return verdict.is_adversarial.tolist()

        def draw(row, eps, restart):
            return torch.Generator().manual_seed(start_seed(seed, spec.name, str(names[row]), eps, restart))

        attacked.effort = attack(model, images, labels, batch_size=batch_size, claim=claim, draw=draw)
        return attacked

    return run


@pytest.fixture
def assert_batches_do_not_matter(in_double, attack_with):
    def compare(spec, batch_sizes=(1, 3), count=8, atol=1e-9):
        model, images, labels = in_double[0], in_double[1][:count], in_double[2][:count]
        whole = attack_with(spec, model, images, labels)
        for batch_size in batch_sizes:
            parts = attack_with(spec, model, images, labels, batch_size=batch_size)
            assert torch.equal(whole.is_broken, parts.is_broken)
            torch.testing.assert_close(whole.proposals, parts.proposals, atol=atol, rtol=0)
            assert torch.equal(whole.effort.forward_passes, parts.effort.forward_passes)

    return compare


@pytest.fixture
def assert_breaks_beyond_the_nearest(linear_problem, attack_with):
    """With `make(*ladder)` images break just beyond the nearest adversarial image and not before, within ball and box."""

    def check(make, norm, count, *, classes=2, step=0.02, most=8):
        problem = linear_problem(count, classes=classes)
        nearest = problem.nearest(norm)
        ladder = sorted(float(share * wanted) for wanted in nearest[:most] for share in (1 - step, 1 + step))
        attacked = attack_with(make(*ladder), *problem, batch_size=3)
        for eps, is_broken, proposals in zip(ladder, attacked.is_broken, attacked.proposals, strict=True):
            decided = (eps - nearest).abs() > step / 2 * nearest
            assert torch.equal(is_broken[decided], eps > nearest[decided])
            assert ThreatModel(norm, eps).is_in_ball(problem.images, proposals).all()
            assert is_in_box(proposals).all()

    return check


@pytest.fixture
def beside_peer(trained, attack_with):
    """Of 60 images that are right when clean, how many our attack breaks, and how many the one that a peer makes of a model."""

    def compare(spec, make):
        model, images, labels = trained
        with torch.no_grad():
            correct = model(images).argmax(1) == labels
        images, labels = images[correct][:60], labels[correct][:60]
        ours = attack_with(spec, model, images, labels, batch_size=60).is_broken.sum()
        adversarial = make(model)(images, labels)
        with torch.no_grad():
            return ours, (model(adversarial).argmax(1) != labels).sum()

    return compare


@pytest.fixture
def path_of(linear_problem, attack_with):
    """How far from the clean image the model is asked, in units of the nearest adversarial one; two classes, linear."""

    def path(spec):
        problem = linear_problem(1, classes=2)
        model, image, seen = deepcopy(problem.model).double(), problem.images.double(), []

        class Watched(nn.Module):
            def forward(self, images):
                seen.append(distance(image, images.detach(), spec.norm).item())
                return model(images)

        attack_with(spec, Watched(), image, problem.labels)
        # The first is the harness asking how many classes there are.
        return [length / problem.nearest(spec.norm).item() for length in seen[1:]]

    return path
