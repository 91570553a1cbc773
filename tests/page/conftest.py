"""Runs in folders as evaluations leave them, and a judged claim."""

import math

import numpy as np
import pytest
from made_rows import build_row

from lrrobust.page import write_page
from lrrobust.page.claim_figures import sketch_claims
from lrrobust.report.drawing import Drawers
from lrrobust.report.figures import sketch_runs
from lrrobust.report.summary import summarise
from lrrobust.report.worst_case import worst_cases_by_images
from lrrobust.results import SCHEMA_VERSION, Example, RunStore, load_run, rows_to_table
from lrrobust.verdict import records

HOSTILE = "<script>alert('x')</script>&\"'</style><img src=x onerror=alert(1)>"
LADDER = (1 / 255, 2 / 255)


@pytest.fixture
def hostile():
    return HOSTILE


def build_rows(attack, norm, distances, ladder):
    """Rows of one attack; a distance of None is wrong when clean, infinity withstood. Label is index % 3."""
    return [
        build_row(
            index, attack, norm, eps, distance, prediction=3, key=f"{HOSTILE}/{index}.png", label=index % 3,
            wnid=f"n0000000{index % 3}", clean_prediction=3 if distance is None else index % 3,
        )
        for index, distance in enumerate(distances)
        for eps in ladder
    ]  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """A run on disk: images 0 wrong when clean, 1 to 5 correct; pgd in linf and cw in l2, with their examples."""

    def make(name="run", model="tiny", with_examples=True, planned=2, class_names=(HOSTILE, "ant", "bee", "cat")):
        attacks = {
            "pgd": ("linf", LADDER, [None, 0.9 / 255, 1.9 / 255, math.inf, 0.5 / 255, math.inf]),
            "cw": ("l2", (0.5, math.inf), [None, 0.2, 0.4, 0.6, math.inf, 0.1]),
        }
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "ab" * 32,
            "model": {"name": model, "weights": "V1", "input_size": 8},
            "dataset": {"name": "sample", "sha256": "cd" * 32, "n": 6},
            "attacks": [{"name": attack, "norm": norm, "kind": attack} for attack, (norm, *_) in attacks.items()],
            "plan": {"chunk_size": 6, "parts": [[attack, 0, 6] for attack in attacks][:planned]},
            "command": ["/home/me/bin/lrrobust", "eval", "--model", model, "--n", "6"],
            "created_at": "2026-01-01T00:00:00+00:00",
            "seed": 0,
            "provenance": {"versions": {"torch": "2.13.0"}, "commit": "1234abc", "device": "cpu"},
        }
        if class_names is not None:
            manifest["class_names"] = list(class_names)
        generator = np.random.default_rng(0)
        with RunStore.create_or_resume(tmp_path / "runs" / name, manifest) as store:
            for attack, (norm, ladder, distances) in attacks.items():
                examples = [
                    Example(
                        index,
                        generator.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                        None if math.isinf(distance) else np.full((8, 8, 3), 0.01, np.float16),
                    )
                    for index, distance in enumerate(distances)
                    if distance is not None
                ]
                if with_examples:
                    store.write_examples(attack, 0, 6, examples)
                store.write_part(attack, 0, 6, rows_to_table(build_rows(attack, norm, distances, ladder)), {"device": "cpu"})
        return load_run(tmp_path / "runs" / name)

    return make


@pytest.fixture
def write():
    """The page of runs and all beside it, as `lrrobust report` writes them; `draw` gives the figures instead."""

    def write(runs, out, verdicts=None, command=("/usr/local/bin/lrrobust", "report", "my runs", "--out", "out"), draw=None):
        verdicts = verdicts or records.Verdicts(made_with="", results=(), not_judged=())
        summary = summarise(runs)
        with Drawers() as drawers:
            draw = draw or drawers.begin(sketch_runs(runs, summary, ["svg"]))
            of_claims = [drawers.begin(sketches) for sketches in sketch_claims(verdicts.results)]
            worst = worst_cases_by_images(runs)
            return write_page(runs, out, command, verdicts, draw, summary, claim_drawings=of_claims, worst=worst)

    return write


@pytest.fixture
def verdicts():
    """One refuted claim with every kind of record, and one that was not judged."""
    claim = records.Claim(
        name="tiny_more_robust", statement=f"tiny is more robust than other {HOSTILE}", source="a paper", treatment="tiny",
        control="other", direction="more_robust", attacks=None, eps=None, dataset=None, significance=0.05, power=0.8,
        smallest_difference=0.02, largest_clean_difference=0.02,
    )  # fmt: skip
    comparison = records.Comparison(
        attack="pgd", norm="linf", eps=1 / 255, population="all", is_decisive=True, is_cumulative=False, n=6,
        treatment_accuracy=0.25,
        control_accuracy=0.5, difference=-0.25, low=-0.6, high=0.2, treatment_only=1, control_only=3, p_value=0.625,
        p_holm=1.0, smallest_detectable=None,
    )  # fmt: skip
    curve = records.CurveComparison(
        attack="pgd", norm="linf", population="all", is_cumulative=False, n=6, eps=LADDER,
        treatment_robust=(0.25, 0.1), control_robust=(0.5, 0.2),
        treatment_area=0.175, control_area=0.35, difference=-0.175, low=-0.3, high=0.1, resamples=1000,
    )  # fmt: skip
    norms = records.NormComparison(
        attack="cw", norm="l2", population="both_correct", n=5, treatment_median=0.4, control_median=None,
        treatment_failures=1, control_failures=3, treatment_farther=1, control_farther=4, sign_p_value=0.375,
        wilcoxon_p_value=0.0004, rank_biserial=-0.5, survival=(),
    )  # fmt: skip
    guards = (
        records.Safeguard(name="same_images", passed=True, withholds=("supported", "refuted"), detail="6 of 6 images."),
        records.Safeguard(name="monotone_curves", passed=False, withholds=("refuted",), detail="It rises.", attack="pgd"),
        records.Safeguard(
            name="attack_diagnostics", passed=None, withholds=("supported",), detail="diagnostics not available", attack="pgd"
        ),
    )
    runs = tuple(
        records.RunReference(
            role=role,
            folder="run",
            fingerprint="ab" * 32,
            model=model,
            weights=None,
            state_sha256=None,
            attacks=("pgd",),
            is_complete=True,
            commit=None,
            diagnostics=None,
        )  # fmt: skip
        for role, model in (("treatment", "tiny"), ("control", "other"))
    )
    pairing = records.Pairing(
        dataset="sample", dataset_sha256=("cd" * 32,), n=6, treatment_unpaired=0, control_unpaired=2, both_correct=4,
        treatment_correct_only=1, control_correct_only=1, discarded=0, treatment_clean=0.8, control_clean=0.9,
    )  # fmt: skip
    other = comparison.model_copy(update={"is_decisive": False, "population": "both_correct", "smallest_detectable": 0.31})
    result = records.ClaimResult(
        claim=claim, verdict="refuted", reasons=("The control is more robust.", "At eps 1/255 by 25 points."), pairing=pairing,
        comparisons=(comparison, other), curves=(curve,), norms=(norms,), safeguards=guards, runs=runs,
    )  # fmt: skip
    return records.Verdicts(
        made_with="lrrobust 1.2, commit 56",
        results=(result,),
        not_judged=(records.NotJudged(claim="another", reason="No run of vgg16."),),
    )
