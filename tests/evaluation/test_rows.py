"""Rows and images that are stored: they say what the judge saw."""

import math

import numpy as np
import pytest
import torch
from linear_attacks import CW, LADDER, PGD, rows_of
from torch import nn

from lrrobust.attacks.specs import PgdSpec
from lrrobust.evaluation import rows as rows_module
from lrrobust.results import example_count, load_examples, load_run


def test_rows_are_what_the_judge_sees(problem, tmp_path, run, images):
    rows = run(problem.model, 3, images, [PGD, CW], tmp_path / "run")
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


def test_minimal_norm_attack_is_read_off_at_every_eps_and_infinity(problem, tmp_path, run, images):
    rows = run(problem.model, 3, images, [CW], tmp_path / "run")
    unbounded = rows_of(rows, "cw", math.inf)
    assert unbounded.is_broken.all()
    distance = unbounded.l2_distance.to_numpy(dtype=float)
    np.testing.assert_array_less(problem.nearest("l2").numpy() * (1 - 1e-4), distance)
    np.testing.assert_array_less(distance, 1.05 * problem.nearest("l2").numpy())
    for eps in CW.eps:
        np.testing.assert_array_equal(rows_of(rows, "cw", eps).is_broken.to_numpy(dtype=bool), distance <= eps)


def test_wrong_when_clean_is_not_attacked_and_counts_as_broken(problem, tmp_path, run, in_memory):
    labels = problem.labels.clone()
    labels[::2] = (labels[::2] + 1) % 3
    rows = run(problem.model, 3, in_memory(problem.images, labels), [PGD], tmp_path / "run")
    is_wrong = rows["index"].isin(range(0, 120, 20))
    wrong = rows[is_wrong]
    assert (wrong.outcome == "wrong_when_clean").all()
    assert wrong.is_broken.all()
    assert (wrong.forward_passes == 0).all()
    assert wrong.adversarial_prediction.isna().all()
    assert rows[~is_wrong].is_clean_correct.all()


def test_eps_zero_equals_clean(problem, tmp_path, run, in_memory):
    labels = problem.labels.clone()
    labels[0] = (labels[0] + 1) % 3
    spec = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(0.0,), steps=5)
    rows = run(problem.model, 3, in_memory(problem.images, labels), [spec], tmp_path / "run")
    np.testing.assert_array_equal(rows.is_broken, ~rows.is_clean_correct)


def test_what_is_near_counts_at_small_eps_wherever_it_was_found(problem, tmp_path, attack_is, run, images):
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
    rows = run(problem.model, 3, images, [spec], tmp_path / "run", chunk_size=12)
    assert calls == [12, 12]
    assert rows_of(rows, "pgd", small).is_broken.all()
    assert (rows_of(rows, "pgd", small).outcome == "broken").all()
    assert (rows_of(rows, "pgd", large).outcome == "broken_at_smaller_eps").all()
    np.testing.assert_allclose(rows.linf_distance.to_numpy(dtype=float), 0.008, atol=1e-6)


class TestExamples:
    def test_are_the_nearest_adversarial_images_of_what_was_correct(self, problem, tmp_path, run, in_memory):
        labels = problem.labels.clone()
        labels[3] = (labels[3] + 1) % 3  # wrong when clean: nothing to show
        images = (255 * problem.images).round() / 255
        with torch.no_grad():
            labels[labels == problem.labels] = problem.model(images).argmax(1)[labels == problem.labels]
        rows = run(problem.model, 3, in_memory(images, labels), [PGD, CW], tmp_path / "run")
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

    def test_only_of_the_beginning_and_again_after_an_interruption(self, linear_problem, tmp_path, monkeypatch, run, in_memory):
        monkeypatch.setattr(rows_module, "example_count", lambda height, width: 7)
        problem = linear_problem(12, 3)
        images = in_memory(problem.images, problem.labels)

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
