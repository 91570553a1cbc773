from dataclasses import dataclass, field

import pytest
import torch

from lrrobust.attacks.build import Attack, Effort
from lrrobust.evaluation.chunks import start_seed
from lrrobust.evaluation.judge import Judge
from lrrobust.threat import ThreatModel


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors are tiny here: threads cost more than they bring, much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
