"""The engine on models whose nearest adversarial images are known, and on models and attacks that misbehave."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lrrobust.attacks import build
from lrrobust.attacks.build import Attack, Effort
from lrrobust.attacks.pgd import pgd
from lrrobust.attacks.specs import CwSpec, FgsmSpec, PgdSpec
from lrrobust.errors import ModelError
from lrrobust.evaluation import engine
from lrrobust.evaluation.engine import evaluate, plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore, example_count, load_examples, load_run

FINGERPRINT = "0123456789abcdef"
# Around the distances of the linear problem below: some images break at each, some do not.
LADDER = (1e-4, 2e-4, 4e-4, 7e-4, 1.5e-3)
L2_LADDER = (1e-3, 2e-3, 4e-3, 7e-3, 1.5e-2)
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)
PLAIN = PgdSpec(
    name="plain", kind="pgd", norm="linf", eps=(1 / 255, 2 / 255, 4 / 255, 8 / 255), steps=10, step_size_ratio=2.5, random_start=False
)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=L2_LADDER, steps=10)
CW = CwSpec(name="cw", kind="cw", eps=L2_LADDER, binary_search_steps=6, steps=100, lr=0.0005, initial_c=1.0)


class ImagesInMemory:
    def __init__(self, images, labels):
        self.images, self.labels_tensor = images, labels
        self.labels = labels.tolist()
        self.indices = [10 * i for i in range(len(labels))]
        self.keys = [f"class/{i}.png" for i in range(len(labels))]
        self.wnids = [f"n{label:08d}" for label in self.labels]
        self.loaded = []

    def __len__(self):
        return len(self.labels)

    def load(self, positions):
        positions = list(positions)
        self.loaded += positions
        return self.images[positions].clone(), self.labels_tensor[positions].clone()


def run(model, num_classes, images, specs, folder, chunk_size=5, batch_size=3, **told):
    tasks = plan_tasks(specs, len(images), chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": FINGERPRINT,
        "attacks": [spec.model_dump(mode="json") for spec in specs],
        "plan": {"chunk_size": chunk_size, "parts": [list(task.part) for task in tasks]},
        "provenance": {},
    }
    with RunStore.create_or_resume(folder, manifest) as store:
        evaluate(
            model, num_classes, images, tasks, store,
            fingerprint=FINGERPRINT, device=torch.device("cpu"), part_metadata={"device": "cpu"}, batch_size=batch_size,
            **told,
        )
        return store.read_rows()


@pytest.fixture
def problem(linear_problem):
    return linear_problem(12, 3)


def rows_of(rows, attack, eps):
    return rows[(rows.attack == attack) & (rows.eps == eps)].sort_values("index")


@pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2, CW], ids=lambda spec: spec.name)
def test_linear_model_breaks_exactly_where_its_margin_says(linear_problem, tmp_path, spec):
    # Two classes: with more, the gradient of the cross-entropy does not point to the nearest one.
    problem = linear_problem(12, 2)
    rows = run(problem.model, 2, ImagesInMemory(problem.images, problem.labels), [spec], tmp_path / "run")
    nearest = problem.nearest(spec.norm).numpy()
    is_judged = 0
    for eps in spec.eps:
        is_broken = rows_of(rows, spec.name, eps).is_broken.to_numpy(dtype=bool)
        assert is_broken[nearest < 0.95 * eps].all()
        assert not is_broken[nearest > eps * (1 + 1e-3)].any()
        is_judged += (nearest < 0.95 * eps).sum() + (nearest > 1.001 * eps).sum()
    assert is_judged > 20
    assert 0 < rows.is_broken.mean() < 1


def test_rows_are_what_the_judge_sees(problem, tmp_path):
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [PGD, CW], tmp_path / "run")
    assert len(rows) == 12 * len(LADDER) + 12 * (len(CW.eps) + 1)
    broken = rows[rows.outcome == "broken"]
    assert len(broken) > 0
    assert (broken.adversarial_prediction != broken.label).all()
    assert (broken.adversarial_margin < 0).all()
    assert (broken[broken.norm == "linf"].linf_distance <= broken[broken.norm == "linf"].eps + 1e-6).all()
    assert (broken[broken.norm == "l2"].l2_distance <= broken[broken.norm == "l2"].eps + 1e-6).all()
    robust = rows[rows.outcome == "robust"]
    assert robust.linf_distance.isna().all()
    assert (robust.adversarial_margin.dropna() >= 0).all()
    assert robust[robust.attack == "pgd"].adversarial_margin.notna().all()
    # What is broken once stays broken at every larger eps, found once and paid for once.
    for _, image in rows[rows.attack == "pgd"].groupby("index"):
        image = image.sort_values("eps")
        assert image.is_broken.astype(int).is_monotonic_increasing
        again = image[image.outcome == "broken_at_smaller_eps"]
        assert (again.forward_passes == 0).all()
        assert again.linf_distance.nunique() <= 1


def test_minimal_norm_attack_is_read_off_at_every_eps_and_infinity(problem, tmp_path):
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [CW], tmp_path / "run")
    unbounded = rows_of(rows, "cw", math.inf)
    assert unbounded.is_broken.all()
    distance = unbounded.l2_distance.to_numpy(dtype=float)
    np.testing.assert_array_less(problem.nearest("l2").numpy() * (1 - 1e-4), distance)
    np.testing.assert_array_less(distance, 1.05 * problem.nearest("l2").numpy())
    for eps in CW.eps:
        np.testing.assert_array_equal(rows_of(rows, "cw", eps).is_broken.to_numpy(dtype=bool), distance <= eps)


def test_what_an_attack_can_come_to_is_told_before(problem, tmp_path):
    labels = problem.labels.clone()
    labels[:2] = (labels[:2] + 1) % 3
    images = ImagesInMemory(problem.images, labels)
    specs, shares = [FGSM, PGD.model_copy(update={"survivors_only": True})], []
    rows = run(problem.model, 3, images, specs, tmp_path / "run", chunk_size=12, on_begin=lambda _, share: shares.append(share))
    # Whom fgsm attacked: all that are correct when clean; and pgd: these where they stood.
    broken = rows[rows.attack == "fgsm"].is_broken
    assert 2 / 12 < broken.mean() < 1
    assert shares == pytest.approx([10 / 12, 1 - broken.mean()])


def test_survivors_alone_are_attacked_again(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    weak = FGSM.model_copy(update={"eps": LADDER[1::2]})
    strong = PGD.model_copy(update={"survivors_only": True})
    alone = run(problem.model, 3, images, [weak, PGD], tmp_path / "alone")
    rows = run(problem.model, 3, images, [weak, strong], tmp_path / "after")
    assert rows[rows.attack == "fgsm"].is_broken.sum() == alone[alone.attack == "fgsm"].is_broken.sum() > 0
    # The worst case of both is the same, and what fgsm broke within an eps was not attacked there.
    distance = rows[rows.attack == "fgsm"].groupby("index").linf_distance.min().astype(float).fillna(math.inf)
    spent = 0
    for eps in LADDER:
        now, before = rows_of(rows, "pgd", eps), rows_of(alone, "pgd", eps)
        assert (now.is_broken.to_numpy() == before.is_broken.to_numpy()).all()
        left_out = now[now.outcome == "broken_by_earlier_attack"]
        assert left_out.empty or left_out.is_broken.all()
        assert (distance[left_out["index"]] <= eps + 1e-6).all()
        assert left_out.forward_passes.sum() == left_out.backward_passes.sum() == 0
        assert left_out.linf_distance.isna().all() and left_out.adversarial_prediction.isna().all()
        spent += now.forward_passes.sum()
    assert spent < alone[alone.attack == "pgd"].forward_passes.sum()
    assert (rows.outcome == "broken_by_earlier_attack").any()


def test_an_attack_in_another_norm_leaves_nobody_out(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    last = PGD_L2.model_copy(update={"survivors_only": True})
    rows = run(problem.model, 3, images, [PGD, last], tmp_path / "run")
    assert rows[rows.attack == "pgd"].is_broken.any()
    assert not (rows.outcome == "broken_by_earlier_attack").any()


def test_minimal_norms_of_survivors(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    cw = CW.model_copy(update={"survivors_only": True, "eps": L2_LADDER[2:]})
    rows = run(problem.model, 3, images, [PGD_L2, cw], tmp_path / "run")
    found = rows[(rows.attack == "pgd_l2") & rows.is_broken].groupby("index").eps.min()
    beaten = set(found[found <= cw.eps[0]].index)
    assert 0 < len(beaten) < len(images)
    unbounded = rows_of(rows, "cw", math.inf)
    assert set(unbounded[unbounded.outcome == "broken_by_earlier_attack"]["index"]) == beaten
    assert ((unbounded.forward_passes == 0) == unbounded["index"].isin(beaten)).all()


def test_a_resumed_run_knows_what_was_broken_before(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    specs = [FGSM, PGD.model_copy(update={"survivors_only": True})]
    whole = run(problem.model, 3, images, specs, tmp_path / "run")
    assert (whole.outcome == "broken_by_earlier_attack").any()
    for lost in ("pgd", "fgsm"):
        for part in (tmp_path / "run" / "parts").glob(f"{lost}-*"):
            part.unlink()
        assert drop_timings(run(problem.model, 3, images, specs, tmp_path / "run")).equals(drop_timings(whole))


def test_wrong_when_clean_is_not_attacked_and_counts_as_broken(problem, tmp_path):
    labels = problem.labels.clone()
    labels[::2] = (labels[::2] + 1) % 3
    rows = run(problem.model, 3, ImagesInMemory(problem.images, labels), [PGD], tmp_path / "run")
    is_wrong = rows["index"].isin(range(0, 120, 20))
    wrong = rows[is_wrong]
    assert (wrong.outcome == "wrong_when_clean").all()
    assert wrong.is_broken.all()
    assert (wrong.forward_passes == 0).all()
    assert wrong.adversarial_prediction.isna().all()
    assert rows[~is_wrong].is_clean_correct.all()


def test_eps_zero_equals_clean(problem, tmp_path):
    labels = problem.labels.clone()
    labels[0] = (labels[0] + 1) % 3
    spec = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(0.0,), steps=5)
    rows = run(problem.model, 3, ImagesInMemory(problem.images, labels), [spec], tmp_path / "run")
    np.testing.assert_array_equal(rows.is_broken, ~rows.is_clean_correct)


def drop_timings(rows):
    return rows.drop(columns="wall_s").reset_index(drop=True)


def test_resumed_run_equals_uninterrupted_one(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    specs = [FGSM, PGD, PGD_L2, CW]
    whole = run(problem.model, 3, images, specs, tmp_path / "whole")
    done = []

    def stop_after(count):
        def on_task(task, is_new):
            done.append((task.part, is_new))
            if sum(new for _, new in done) == count:
                raise KeyboardInterrupt
        return on_task

    for count in (1, 5):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            run(problem.model, 3, images, specs, tmp_path / "parts", on_task=stop_after(count))
    images.loaded.clear()
    done.clear()
    resumed = run(problem.model, 3, images, specs, tmp_path / "parts", on_task=lambda t, new: done.append((t.part, new)))
    assert [new for _, new in done].count(False) == 6
    assert images.loaded.count(0) == 1, "the first chunk is read once more, to see that the model is the same"
    assert drop_timings(resumed).equals(drop_timings(whole))


@pytest.mark.parametrize("spec", [PGD, PGD_L2], ids=lambda spec: spec.name)
def test_chunks_and_batches_change_nothing_but_rounding(problem, tmp_path, spec):
    images = ImagesInMemory(problem.images.double(), problem.labels)
    problem.model.double()
    reference = None
    for chunk_size, batch_size in ((12, 12), (5, 3), (1, 1)):
        folder = tmp_path / f"{chunk_size}-{batch_size}"
        rows = run(problem.model, 3, images, [spec], folder, chunk_size, batch_size=batch_size)
        rows = drop_timings(rows.sort_values(["index", "eps"]))
        reference = rows if reference is None else reference
        exact = ["index", "eps", "outcome", "forward_passes", "adversarial_prediction"]
        assert rows[exact].equals(reference[exact])
        for column in ("linf_distance", "l2_distance", "adversarial_margin"):
            np.testing.assert_allclose(rows[column].to_numpy(float), reference[column].to_numpy(float), rtol=1e-9, atol=1e-12)
    assert {"broken", "robust"} <= set(reference.outcome)


@pytest.mark.parametrize(
    "spec, real_pixels, is_double",
    [
        (PGD, None, True),
        (PGD_L2, None, True),
        (PGD.model_copy(update={"eps": (1.3 / 255, 2 / 255, 3.7 / 255, 6 / 255)}), "judged", True),
        (PGD_L2.model_copy(update={"eps": (0.05, 0.1, 0.2, 0.4)}), "judged", True),
        # In float32 an iterate of a larger budget comes to lie one rounding beyond a smaller budget.
        (PLAIN, None, False),
        (PLAIN, "judged", False),
    ],
)
def test_larger_budgets_ahead_take_nothing_from_smaller_ones(spec, real_pixels, is_double, linear_problem, tmp_path, monkeypatch):
    problem = linear_problem(40, 3)
    precision = torch.float64 if is_double else torch.float32
    pixels, labels = problem.images.to(precision), problem.labels
    problem.model.to(precision)
    if spec.eps[-1] > LADDER[-1] and spec is not PGD_L2:  # images of 8 bits, some grey levels away from the boundary
        pixels = (255 * (0.5 + 8 * (pixels - 0.5)).clamp(0.1, 0.9)).round() / 255
        labels = problem.model(pixels).argmax(1)
    images = ImagesInMemory(pixels, labels)
    found = []
    for ahead in (False, True):
        monkeypatch.setitem(build._RUNNERS, PgdSpec, build._with_settings(functools.partial(pgd, ahead=ahead)))
        folder = tmp_path / str(ahead)
        rows = run(problem.model, 3, images, [spec], folder, chunk_size=40, batch_size=200, real_pixels=real_pixels)
        found.append(rows.sort_values(["index", "eps"]))
    same = ["index", "eps", "is_broken", "outcome", "is_broken_quantized"]
    assert found[0][same].equals(found[1][same])
    assert {"broken", "broken_at_smaller_eps", "robust"} <= set(found[0].outcome)
    if real_pixels is not None:
        assert 0 < found[0].is_broken_quantized.sum() < found[0].is_broken.sum() + (spec is PLAIN)
    stands = found[0].outcome == "robust"
    np.testing.assert_allclose(found[0][stands].adversarial_margin, found[1][stands].adversarial_margin, rtol=1e-9 if is_double else 1e-3)
    assert (found[1][stands].adversarial_margin > 0).all()


def test_forward_passes_and_time_are_those_of_the_attack(problem, tmp_path):
    forwarded = []
    rows = run(
        problem.model, 3, ImagesInMemory(problem.images, problem.labels), [PGD], tmp_path / "run",
        on_forward=forwarded.append,
    )
    assert rows.forward_passes.sum() == sum(forwarded) <= sum(task.cost for task in plan_tasks([PGD], 12, 5))
    assert max(forwarded) == 3
    assert ((rows.wall_s > 0) == (rows.forward_passes > 0)).all()
    assert (rows[rows.outcome == "robust"].forward_passes == PGD.steps).all()


class Shifted(nn.Module):
    """The same parameters, other code."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images * 0.9)


@pytest.mark.parametrize("is_complete", [True, False])
def test_resuming_with_another_model_is_refused(problem, tmp_path, is_complete):
    images = ImagesInMemory(problem.images, problem.labels)
    run(problem.model, 3, images, [FGSM], tmp_path / "run")
    if not is_complete:
        next((tmp_path / "run" / "parts").glob("*-000005-*")).unlink()
    with pytest.raises(ModelError, match="holds results of another model"):
        run(Shifted(problem.model).eval(), 3, images, [FGSM], tmp_path / "run")


def test_what_is_near_counts_at_small_eps_wherever_it_was_found(problem, tmp_path, attack_is):
    """An attack that fails at its first, small budget, and at the next finds images well within the first."""
    small, large = 0.01, 0.5
    calls = []

    def attack(model, images, labels):
        calls.append(len(images))
        if len(calls) == 1:
            return images
        with torch.enable_grad():
            leaf = images.clone().requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)[0]
        return images + 0.008 * gradient.sign()

    attack_is(attack)
    spec = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(small, large), steps=1)
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [spec], tmp_path / "run", chunk_size=12)
    assert calls == [12, 12]
    assert rows_of(rows, "pgd", small).is_broken.all()
    assert (rows_of(rows, "pgd", small).outcome == "broken").all()
    assert (rows_of(rows, "pgd", large).outcome == "broken_at_smaller_eps").all()
    np.testing.assert_allclose(rows.linf_distance.to_numpy(dtype=float), 0.008, atol=1e-6)


class BatchNormOfTheBatch(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, images):
        return self.norm(self.model(images))


class Detached(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.detach())


class InPlace(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        with torch.no_grad():
            images.clamp_(0.5, 0.6)
        return self.model(images)


class InPlaceUnseen(InPlace):
    """Neither autograd nor the tensor's version hears of it."""

    def forward(self, images):
        images.data.mul_(0.5)
        return self.model(images)


class NeedsMemory(nn.Module):
    """Has room for no image at all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (BatchNormOfTheBatch, "depend on the other images of the batch"),
        (Detached, "carry no gradient"),
        (InPlace, "changes the images it is given.*let forward work on a copy"),
        (InPlaceUnseen, "changes the images it is given"),
        (NeedsMemory, "out of memory on cpu with a single image: use smaller images, or another device"),
    ],
)
def test_models_that_cannot_be_judged_are_refused(problem, tmp_path, wrapper, message):
    with pytest.raises(ModelError, match=message):
        run(
            wrapper(problem.model).eval(), 3, ImagesInMemory(problem.images, problem.labels), [FGSM], tmp_path / "run",
            batch_size=5,
        )


def test_a_damaged_part_is_computed_again(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    whole = run(problem.model, 3, images, [PGD], tmp_path / "run")
    part = sorted((tmp_path / "run" / "parts").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:-20])
    again = run(problem.model, 3, images, [PGD], tmp_path / "run")
    assert drop_timings(again).equals(drop_timings(whole))


def test_random_state_of_the_caller_is_untouched_and_irrelevant(problem, tmp_path):
    images = ImagesInMemory(problem.images, problem.labels)
    torch.manual_seed(1)
    first = run(problem.model, 3, images, [PGD], tmp_path / "a")
    drawn = torch.rand(3)
    torch.manual_seed(2)
    torch.rand(1)
    second = run(problem.model, 3, images, [PGD], tmp_path / "b")
    assert drop_timings(first).equals(drop_timings(second))
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, torch.rand(3), atol=0, rtol=0)


@pytest.fixture
def attack_is(monkeypatch):
    """Replaces every attack by a function of (model, images, labels), asked at each budget for images that stand."""

    def replace(function):
        class Replacement(Attack):
            def __call__(self, model, images, labels, *, batch_size, claim, draw, levels):
                passes = torch.zeros(len(self.ladder), len(images), dtype=torch.int64)
                rows = list(range(len(images)))
                for eps in self.ladder:
                    if rows:
                        is_broken = claim(rows, function(model, images[rows], labels[rows]), [eps] * len(rows), [True] * len(rows))
                        rows = [row for row, broken in zip(rows, is_broken, strict=True) if not broken]
                return Effort(passes, passes, 0)

        monkeypatch.setattr(engine, "Attack", Replacement)

    return replace


def one_eps(eps):
    return PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(eps,), steps=1)


def test_survivors_whose_nearest_image_is_not_found_stay_robust_without_a_budget(problem, tmp_path, attack_is):
    attack_is(lambda model, images, labels: images)
    cw = CW.model_copy(update={"survivors_only": True})
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [PGD_L2, cw], tmp_path / "run")
    assert not rows.is_broken.any() and set(rows.outcome) == {"robust"}


def test_an_attack_that_leaves_the_ball_is_rejected_not_believed(problem, tmp_path, attack_is):
    attack_is(lambda model, images, labels: 1 - images)
    flipped_labels = problem.model(1 - problem.images).argmax(1)
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [one_eps(0.001)], tmp_path / "run")
    assert not rows.is_broken.any()
    is_flipped = (flipped_labels != problem.labels).numpy()
    assert is_flipped.any()
    np.testing.assert_array_equal((rows.sort_values("index").outcome == "rejected").to_numpy(), is_flipped)


def test_what_was_broken_once_stays_broken_whatever_is_claimed_later(problem, tmp_path, monkeypatch):
    class Forgetful(Attack):
        def __call__(self, model, images, labels, *, claim, **_):
            with torch.enable_grad():
                leaf = images.clone().requires_grad_()
                gradient = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)[0]
            rows, eps = list(range(len(images))), list(self.ladder) * len(images)
            for length, is_last in ((0.04, False), (0.05, False), (0.0, True)):
                assert all(claim(rows, images + length * gradient.sign(), eps, [is_last] * len(rows)))
            passes = torch.ones(1, len(images), dtype=torch.int64)
            return Effort(passes, passes, 0)

    monkeypatch.setattr(engine, "Attack", Forgetful)
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [one_eps(0.05)], tmp_path / "run")
    assert rows.is_broken.all() and (rows.adversarial_prediction != rows.label).all()
    np.testing.assert_allclose(rows.linf_distance.to_numpy(dtype=float), 0.04, atol=1e-6)


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_an_attack_that_proposes_no_numbers_breaks_nothing(problem, tmp_path, attack_is, pixel):
    attack_is(lambda model, images, labels: torch.full_like(images, pixel))
    rows = run(problem.model, 3, ImagesInMemory(problem.images, problem.labels), [one_eps(0.5)], tmp_path / "run")
    assert not rows.is_broken.any()
    assert (rows.outcome == "rejected").all()


class NanAway(nn.Module):
    """Sound on images of mean near one half, NaN elsewhere: as networks that overflow are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        logits = self.model(images)
        return torch.where((images.amax((1, 2, 3)) > 0.9).view(-1, 1), torch.nan, logits)


def test_nan_logits_stop_the_run_and_keep_what_was_done(problem, tmp_path, attack_is):
    images = ImagesInMemory(problem.images, problem.labels)
    calls = []

    def attack(model, batch, labels):
        calls.append(len(batch))
        return batch if len(calls) == 1 else torch.ones_like(batch)

    attack_is(attack)
    with pytest.raises(ModelError, match=r"NaN or infinite logits for 5 of 5 images, the first is class/5.png"):
        run(NanAway(problem.model).eval(), 3, images, [one_eps(1.0)], tmp_path / "run")
    assert len(list((tmp_path / "run" / "parts").glob("*.parquet"))) == 1


class Failing(nn.Module):
    def forward(self, images):
        raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")


@pytest.mark.parametrize(
    ("model", "num_classes", "message"),
    [
        (Failing(), 3, "fails on images of shape .* RuntimeError: mat1 and mat2 shapes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 3, r"\(4, 4\).*expected logits of shape \(4, 3\)"),
        (nn.Identity(), 3, "expected logits"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(problem, tmp_path, model, num_classes, message):
    with pytest.raises(ModelError, match=message) as caught:
        run(model, num_classes, ImagesInMemory(problem.images, problem.labels), [FGSM], tmp_path / "run")
    assert "\n" not in str(caught.value)


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images) + torch.randn(len(images), 3)


def test_a_randomised_model_is_said_aloud(problem, tmp_path, caplog):
    run(Noisy(problem.model).eval(), 3, ImagesInMemory(problem.images, problem.labels), [FGSM], tmp_path / "run")
    assert "the model is randomised" in caplog.text
    assert all("randomised" in part for part in load_run(tmp_path / "run").part_metadata.values())


def test_the_model_is_given_back_as_it_was(problem, tmp_path):
    model = nn.Sequential(problem.model, nn.BatchNorm1d(3)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run(model, 3, ImagesInMemory(problem.images, problem.labels), [FGSM, PGD], tmp_path / "run")
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], atol=0, rtol=0)


class TestExamples:
    def test_are_the_nearest_adversarial_images_of_what_was_correct(self, problem, tmp_path):
        labels = problem.labels.clone()
        labels[3] = (labels[3] + 1) % 3  # wrong when clean: nothing to show
        images = (255 * problem.images).round() / 255
        with torch.no_grad():
            labels[labels == problem.labels] = problem.model(images).argmax(1)[labels == problem.labels]
        rows = run(problem.model, 3, ImagesInMemory(images, labels), [PGD, CW], tmp_path / "run")
        examples = load_examples(load_run(tmp_path / "run"))
        assert set(examples) == {"pgd", "cw"}
        for attack, distance in (("pgd", "linf_distance"), ("cw", "l2_distance")):
            last = rows_of(rows, attack, PGD.eps[-1] if attack == "pgd" else math.inf).set_index("index")
            assert [example.index for example in examples[attack]] == list(last.index[last.is_clean_correct])
            for example in examples[attack]:
                row, image = last.loc[example.index], images[example.index // 10]
                assert torch.equal(torch.from_numpy(example.clean.copy()).permute(2, 0, 1) / 255, image)
                assert (example.perturbation is not None) == row.is_broken
                if row.is_broken:
                    found = example.perturbation.astype(np.float64)
                    norm = abs(found).max() if attack == "pgd" else np.sqrt((found**2).sum())
                    assert norm == pytest.approx(row[distance], rel=1e-3)
            assert any(example.perturbation is None for example in examples["pgd"])

    def test_only_of_the_beginning_and_again_after_an_interruption(self, linear_problem, tmp_path, monkeypatch):
        monkeypatch.setattr(engine, "example_count", lambda height, width: 7)
        problem = linear_problem(12, 3)
        images = ImagesInMemory(problem.images, problem.labels)

        def stop(task, is_new):
            if is_new and task.chunk.start == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(problem.model, 3, images, [PGD], tmp_path / "run", on_task=stop)
        before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "examples").iterdir()}
        run(problem.model, 3, images, [PGD], tmp_path / "run")
        after = {path.name: path.read_bytes() for path in (tmp_path / "run" / "examples").iterdir()}
        assert list(before) == ["pgd-000000-000005.parquet"] and before.items() < after.items()
        assert [e.index for e in load_examples(load_run(tmp_path / "run"))["pgd"]] == [10 * i for i in range(7)]

    def test_their_number_is_bounded_by_bytes(self):
        for side in (8, 64, 224, 512):
            assert example_count(side, side) * side * side * 3 * 2 <= 8e6 or example_count(side, side) == 8
