"""Models that make attacks fail in known ways, and the way from a model to its diagnostics: a real evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from made_models import Function, ImagesInMemory
from torch import nn

from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.diagnostics.outcomes import predicted_classes, read_outcomes
from lrrobust.diagnostics.stage import diagnose
from lrrobust.diagnostics.subject import Subject
from lrrobust.evaluation.engine import evaluate
from lrrobust.evaluation.judge import Judge
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

SIZE, CLASSES, PIXELS = 8, 5, 3 * 8 * 8
LADDER = tuple(step / 255 for step in (2, 4, 8, 16))
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)


#: Of the distillation: trained at it, a network has logits so many times too large at temperature 1.
TEMPERATURE = 1000.0


def build_linear(scale: float = 1.0) -> nn.Module:
    """Whose images break somewhere on the ladder."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(PIXELS, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(CLASSES, PIXELS, generator=generator))
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


def before(change) -> nn.Module:
    """A linear classifier behind something done to its images."""
    return nn.Sequential(Function(change), build_linear())


def behind(change) -> nn.Module:
    """A linear classifier with something done to its logits."""
    return nn.Sequential(build_linear(), Function(change))


def rounded(images: torch.Tensor) -> torch.Tensor:
    """To multiples of 1/48: gradient zero everywhere."""
    return (images * 48).round() / 48


def shattered(images: torch.Tensor) -> torch.Tensor:
    """Moved by at most 0.002, with a gradient that is 200 times larger and without meaning."""
    return images + 0.002 * torch.sin(1e5 * images)


class _GradientOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        levels = images * 255
        ctx.save_for_backward((levels - levels.round()).abs().flatten(1).amax(1) < 1e-3)
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        (is_on_grid,) = ctx.saved_tensors
        return gradient * is_on_grid[:, None, None, None]


def gradient_on_grid(images: torch.Tensor) -> torch.Tensor:
    """With a gradient at images of 8 bits only, where a single step starts and iterates never are."""
    return _GradientOnGrid.apply(images)


class _GradientWhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, chosen):
        ctx.chosen = chosen
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.chosen(gradient), None


def gradient_of_few(images: torch.Tensor) -> torch.Tensor:
    """With a gradient for a tenth of the values, drawn anew each time: every step of an attack moves as many more."""
    return _GradientWhere.apply(images, lambda gradient: torch.rand_like(gradient) < 0.1)


def gradient_of_quarter(images: torch.Tensor) -> torch.Tensor:
    """With a gradient for a quarter of the values, always the same: attacks by gradient find a part of what there is."""
    chosen = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(3)) < 0.25
    return _GradientWhere.apply(images, lambda gradient: chosen)


def random_off_grid(images: torch.Tensor) -> torch.Tensor:
    """Noise on images that are not of 8 bits, as attacks make them."""
    is_off = ((images * 255).round() / 255 - images).abs().flatten(1).amax(1) > 1e-6
    return images + 0.02 * is_off[:, None, None, None] * torch.randn_like(images)


def noise_by(seed_of):
    """Noise whose seed is made of the image: the same twice, and another one for the next image."""

    def add(images):
        draws = [torch.Generator().manual_seed(seed_of(image)) for image in images.detach()]
        return images + 0.05 * torch.stack([torch.randn(images.shape[1:], generator=draw) for draw in draws])

    return add


def seed_of_bits(image: torch.Tensor) -> int:
    return int(image.view(torch.int32).sum())


def seed_of_levels(image: torch.Tensor) -> int:
    """Of the image rounded to 8 bits."""
    return int((255 * image).round().sum())


class AntiAdversary(nn.Module):
    """Moves images two steps towards the class that it first takes them for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = build_linear()

    def forward(self, images):
        moved = images.detach()
        with torch.enable_grad():
            first = self.linear(moved).argmax(1)
            for _ in range(2):
                moved.requires_grad_()
                loss = nn.functional.cross_entropy(self.linear(moved), first, reduction="sum")
                moved = (moved - 4 / 255 * torch.autograd.grad(loss, moved)[0].sign()).detach()
        return self.linear(images + (moved - images.detach()))


class Voting(nn.Module):
    """How many of three networks chose each class, with the gradient of their probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(build_linear() for _ in range(3))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(2)
            for network in self.networks:
                network[1].weight += 0.1 * torch.randn_like(network[1].weight)

    def forward(self, images):
        shares = [network(images).softmax(1) for network in self.networks]
        return sum((share == share.amax(1, keepdim=True)).to(share) + share - share.detach() for share in shares)


#: What each unsound model does, by the name that tests ask for.
UNSOUND = {
    "rounded": lambda: before(rounded),
    # One level of 8 bits in 32 is just between two of these.
    "rounded_coarsely": lambda: before(lambda images: (images * 255 / 32).round() * 32 / 255),
    "shattered": lambda: before(shattered),
    "gradient_on_grid": lambda: before(gradient_on_grid),
    "gradient_of_few": lambda: before(gradient_of_few),
    "gradient_of_quarter": lambda: before(gradient_of_quarter),
    # What defensive distillation at a high temperature leaves: probabilities that float32 rounds to 0 and 1.
    "distilled": lambda: nn.Sequential(build_linear(TEMPERATURE), nn.Softmax(1)),
    "randomised": lambda: behind(lambda logits: logits + 0.05 * torch.randn_like(logits)),
    "random_off_grid": lambda: before(random_off_grid),
    "noise_of_bits": lambda: before(noise_by(seed_of_bits)),
    "noise_of_levels": lambda: before(noise_by(seed_of_levels)),
    # What float32 leaves of logits after a detour over 2e7: steps of 2.
    "cancelling": lambda: behind(lambda logits: (logits + 2e7) - 2e7),
    "anti_adversary": AntiAdversary,
    "voting": Voting,
    # Whose margin falls nearly all the way with the first vote lost.
    "log_votes": lambda: nn.Sequential(Voting(), Function(lambda votes: (votes + 1e-3).log())),
}


@pytest.fixture
def unsound():
    """Name -> a model that makes attacks fail."""
    return lambda name: UNSOUND[name]().eval()


@pytest.fixture
def sound_linear():
    return build_linear()


@pytest.fixture
def confident_linear():
    """With logits so large that the float32 cross-entropy has no gradient: distilled at a high temperature."""
    return build_linear(TEMPERATURE)


def build_cnn(scale: float) -> nn.Module:
    """Untrained, with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Tanh(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES),
        )  # fmt: skip
        with torch.no_grad():
            model[-1].weight *= scale
    return model.eval()


@pytest.fixture
def sound_cnn():
    """With logits as large as training makes them."""
    return build_cnn(100)


@pytest.fixture
def confident_cnn():
    """With leads that leave the other classes no weight in the gradient of a float32 softmax."""
    return build_cnn(10_000)


@pytest.fixture
def with_decoys():
    """A network, how many -> the network with so many logits more that stay a hair below its leading one."""

    def add(network, decoys):
        decoy = Function(lambda logits: torch.cat([logits, (logits.amax(1, keepdim=True) - 1e-3).expand(-1, decoys)], 1))
        return nn.Sequential(network, decoy).eval()

    return add


@pytest.fixture
def images():
    """Of 8 bits, as images on disk."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (120, 3, SIZE, SIZE), generator=generator) / 255


@pytest.fixture
def evaluated(tmp_path, images):
    """Evaluates a model on images that it gets right: (images, finished run)."""

    def run(model, specs):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            logits = model(images)
            labels = logits.argmax(1)
        data = ImagesInMemory(images, labels)
        tasks = plan_tasks(specs, len(data), 50)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "0123456789abcdef",
            "attacks": [spec.model_dump(mode="json") for spec in specs],
            "plan": {"chunk_size": 50, "parts": [list(task.part) for task in tasks]},
        }
        # Of its own for every call: a second one in the same folder would go on with the rows of the first.
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with RunStore.create_or_resume(folder, json.loads(json.dumps(manifest))) as store:
            evaluate(
                model,
                logits.shape[1],
                data,
                tasks,
                store,
                fingerprint=manifest["fingerprint"],
                device=torch.device("cpu"),
                part_metadata={},
            )
        return data, load_run(folder)

    return run


@pytest.fixture
def subject_of(evaluated):
    """Evaluates a model, and gives what checks are given; `spoil` may change the outcomes first."""

    def build(model, *specs, spoil=lambda outcomes: outcomes):
        data, run = evaluated(model, specs)
        places, outcomes = read_outcomes(run.rows, specs)

        def load(chosen):
            at = [int(places[place]) for place in chosen]
            return *data.load(at), [data.keys[place] for place in at]

        with torch.no_grad(), torch.random.fork_rng():
            judge = Judge(model, model(data.images[:1]).shape[1], 64)
        outcomes = tuple(spoil(each) for each in outcomes)
        return Subject(judge, *load(range(24)), outcomes, load, "0123456789abcdef", predicted_classes(run.rows))

    return build


@pytest.fixture
def diagnosed(evaluated):
    """Evaluates a model, with fgsm and pgd unless told otherwise, and looks into its attacks: (check, attack) -> result."""

    def run(model, *specs):
        specs = specs or (FGSM, PGD)
        data, finished = evaluated(model, specs)
        found = diagnose(model, CLASSES, data, specs, finished, torch.device("cpu"))
        return {(result.name, result.attack): result for result in found.results}

    return run
