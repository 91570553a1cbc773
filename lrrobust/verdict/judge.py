"""Judges claims on runs: evidence in, verdict with reasons out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from lrrobust.formatting import format_eps
from lrrobust.provenance import describe_code
from lrrobust.results import Run, manifest_value, write_file
from lrrobust.stats import (
    bootstrap_mean_interval,
    compare_distances,
    log_area_weights,
    median_with_failures,
    paired_difference_interval,
    survival,
)
from lrrobust.verdict.evidence import Evidence, ModelOutcomes, PairedAttack, collect_evidence
from lrrobust.verdict.records import (
    POPULATIONS,
    Claim,
    ClaimResult,
    Comparison,
    CurveComparison,
    NormComparison,
    NotJudged,
    Outcome,
    Pairing,
    Population,
    RunReference,
    Safeguard,
    SurvivalPoint,
    Verdicts,
    is_unbounded,
)
from lrrobust.verdict.rule import Findings, PairedTests, compare_pairs, find, smallest_detectable
from lrrobust.verdict.safeguards import check_evidence

#: Bootstrap samples for each area.
RESAMPLES = 10_000

#: Points of a survival curve, at most.
SURVIVAL_POINTS = 200

_IN_WORDS: dict[Population, str] = {
    "all": "all images",
    "both_correct": "images both classify correctly",
    "matched_accuracy": "images at matched clean accuracy",
}


def judge_claims(claims: Sequence[Claim], runs: Sequence[Run]) -> Verdicts:
    """Every claim on every set of images that the runs offer for it.

    Raises:
        StoreError: a manifest does not say what was evaluated.
    """
    results: list[ClaimResult] = []
    not_judged: list[NotJudged] = []
    for claim in claims:
        evidence, refused = collect_evidence(claim, runs)
        judged = [judge(each) for each in evidence]
        if len(judged) > 1:
            # Whoever picks the best of several has more chances to be wrong.
            note = (
                f"This is one of {len(judged)} verdicts on the claim, on other images, attacks or weights: each is wrong with "
                f"at most {100 * claim.significance:g} % probability, but any one of them with up to {len(judged)} times that."
            )
            judged = [result.model_copy(update={"reasons": (*result.reasons, note)}) for result in judged]
        results += judged
        not_judged += refused
    return Verdicts(made_with=describe_code(), results=tuple(results), not_judged=tuple(not_judged))


def judge(evidence: Evidence) -> ClaimResult:
    """The verdict by the rule of `lrrobust.verdict.rule`, unless a safeguard withholds it."""
    claim = evidence.claim
    rows = [(attack, eps) for attack in evidence.decisive for eps in evidence.ladder(attack)]
    tests = _test(rows, evidence)
    findings = find(
        tests,
        [attack.norm for attack, _ in rows],
        is_more=claim.direction == "more_robust",
        significance=claim.significance,
        smallest_difference=claim.smallest_difference,
    )
    others = [
        (attack, eps) for attack in evidence.attacks if attack not in evidence.decisive for eps in evidence.ladder(attack)
    ]
    comparisons = _comparisons(rows, tests, evidence, is_decisive=True)
    if others:
        comparisons += _comparisons(others, _test(others, evidence), evidence, is_decisive=False)

    safeguards = check_evidence(evidence)
    by_numbers: Outcome = "inconclusive"
    if findings.is_supported:
        by_numbers = "supported"
    elif findings.is_refuted:
        by_numbers = "refuted"
    # What fails only hinders the verdict that rests on it; where there is none, every failure is worth a word.
    failed = [
        guard
        for guard in safeguards
        if guard.passed is False and (by_numbers == "inconclusive" or by_numbers in guard.withholds)
    ]
    return ClaimResult(
        claim=claim,
        verdict="inconclusive" if failed else by_numbers,
        reasons=(
            *_reasons(claim, by_numbers, failed, findings, [row for row in comparisons if row.is_decisive]),
            *_answered(safeguards),
            *_left_out(evidence),
            *_not_said(claim),
        ),
        pairing=_pairing(evidence),
        comparisons=tuple(comparisons),
        curves=tuple(_curves(evidence)),
        norms=tuple(_norms(evidence)),
        safeguards=safeguards,
        runs=(*_references(evidence.treatment, "treatment"), *_references(evidence.control, "control")),
    )


def write_verdicts(verdicts: Verdicts, path: Path) -> None:
    """Writes `claim.json`; raises StoreError where it cannot."""
    write_file(path, verdicts.model_dump_json(indent=2).encode() + b"\n")


# --- numbers -----------------------------------------------------------------------------------------


def _test(rows: Sequence[tuple[PairedAttack, float]], evidence: Evidence) -> PairedTests:
    counts = np.zeros((3, len(POPULATIONS), len(rows)), dtype=np.int64)
    for column, (attack, eps) in enumerate(rows):
        treatment, control = attack.treatment > eps, attack.control > eps
        for row, population in enumerate(POPULATIONS):
            members = evidence.populations[population] & attack.is_finished
            counts[:, row, column] = (
                (members & treatment & ~control).sum(),
                (members & control & ~treatment).sum(),
                members.sum(),
            )
    return compare_pairs(*counts, evidence.claim.significance)


def _comparisons(
    rows: Sequence[tuple[PairedAttack, float]], tests: PairedTests, evidence: Evidence, *, is_decisive: bool
) -> list[Comparison]:
    """Population by population; rows without images are left out."""
    claim, found = evidence.claim, []
    norms = len({attack.norm for attack, _ in rows})
    for place, population in enumerate(POPULATIONS):
        for column, (attack, eps) in enumerate(rows):
            cell = (place, column)
            n = int(tests.n[cell])
            if n == 0:
                continue
            members = evidence.populations[population] & attack.is_finished
            found.append(
                Comparison(
                    attack=attack.name,
                    norm=attack.norm,
                    eps=eps,
                    population=population,
                    is_decisive=is_decisive,
                    is_cumulative=attack.is_cumulative,
                    n=n,
                    treatment_accuracy=float((attack.treatment[members] > eps).mean()),
                    control_accuracy=float((attack.control[members] > eps).mean()),
                    difference=float(tests.difference[cell]),
                    low=float(tests.low[cell]),
                    high=float(tests.high[cell]),
                    treatment_only=int(tests.treatment_only[cell]),
                    control_only=int(tests.control_only[cell]),
                    p_value=float(tests.p_value[cell]),
                    p_holm=float(tests.p_holm[cell]),
                    smallest_detectable=smallest_detectable(
                        n,
                        int(tests.treatment_only[cell] + tests.control_only[cell]),
                        rows=len(rows),
                        norms=norms,
                        populations=len(POPULATIONS),
                        significance=claim.significance,
                        power=claim.power,
                        smallest_difference=claim.smallest_difference,
                    ),
                )
            )
    return found


def _curves(evidence: Evidence) -> list[CurveComparison]:
    found = []
    for attack in evidence.attacks:
        ladder = evidence.ladder(attack)
        if len(ladder) < 2:
            continue
        weights = log_area_weights(ladder)
        for population in POPULATIONS:
            members = evidence.populations[population] & attack.is_finished
            if not members.any():
                continue
            treatment, control = (side[members, None] > np.array(ladder) for side in (attack.treatment, attack.control))
            # From whole numbers per image and eps, so that equal patterns give equal floats and fall together.
            patterns, counts = np.unique(treatment.astype(np.int8) - control, axis=0, return_counts=True)
            low, high = bootstrap_mean_interval(
                np.repeat(patterns @ weights, counts), 1 - evidence.claim.significance, resamples=RESAMPLES
            )
            areas = [float(side.mean(0) @ weights) for side in (treatment, control)]
            found.append(
                CurveComparison(
                    attack=attack.name,
                    norm=attack.norm,
                    population=population,
                    is_cumulative=attack.is_cumulative,
                    n=int(members.sum()),
                    eps=ladder,
                    treatment_robust=tuple(treatment.mean(0).tolist()),
                    control_robust=tuple(control.mean(0).tolist()),
                    treatment_area=areas[0],
                    control_area=areas[1],
                    difference=areas[0] - areas[1],
                    low=low,
                    high=high,
                    resamples=RESAMPLES,
                )
            )
    return found


def _norms(evidence: Evidence) -> list[NormComparison]:
    found = []
    for attack in evidence.attacks:
        if not attack.has_distances:
            continue
        for population in POPULATIONS:
            members = evidence.populations[population] & attack.is_finished
            if not members.any():
                continue
            treatment, control = attack.treatment[members], attack.control[members]
            paired = compare_distances(treatment, control)
            at = _thinned(np.concatenate([treatment, control]))
            found.append(
                NormComparison(
                    attack=attack.name,
                    norm=attack.norm,
                    population=population,
                    n=len(treatment),
                    treatment_median=_median(treatment),
                    control_median=_median(control),
                    treatment_failures=int(np.isinf(treatment).sum()),
                    control_failures=int(np.isinf(control).sum()),
                    treatment_farther=paired.treatment_farther,
                    control_farther=paired.control_farther,
                    sign_p_value=paired.sign_p_value,
                    wilcoxon_p_value=paired.wilcoxon_p_value,
                    rank_biserial=paired.rank_biserial,
                    survival=tuple(
                        SurvivalPoint(distance=distance, treatment=ours, control=theirs)
                        for distance, ours, theirs in zip(
                            at.tolist(), survival(treatment, at).tolist(), survival(control, at).tolist()
                        )
                    ),
                )
            )
    return found


def _median(distances: NDArray[np.float64]) -> float | None:
    median = median_with_failures(distances[np.isfinite(distances)], len(distances))
    return median if np.isfinite(median) else None


def _thinned(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 and the finite distances, or as many quantiles of them as a curve needs."""
    steps = np.unique(np.append(distances[np.isfinite(distances)], 0.0))
    if len(steps) <= SURVIVAL_POINTS:
        return steps
    return steps[np.linspace(0, len(steps) - 1, SURVIVAL_POINTS).round().astype(np.int64)]


def _pairing(evidence: Evidence) -> Pairing:
    ours, theirs = evidence.is_clean_correct
    n, runs = len(ours), evidence.runs
    return Pairing(
        dataset=manifest_value(runs[0], "dataset", "name"),
        dataset_sha256=tuple(sorted({manifest_value(run, "dataset", "sha256") for run in runs})),
        n=n,
        treatment_unpaired=len(evidence.treatment.images) - n,
        control_unpaired=len(evidence.control.images) - n,
        both_correct=int((ours & theirs).sum()),
        treatment_correct_only=int((ours & ~theirs).sum()),
        control_correct_only=int((theirs & ~ours).sum()),
        discarded=n - int(evidence.populations["matched_accuracy"].sum()),
        treatment_clean=float(ours.mean()),
        control_clean=float(theirs.mean()),
    )


def _references(side: ModelOutcomes, role: str) -> list[RunReference]:
    return [
        RunReference(
            role=role,
            folder=run.folder.resolve().name,
            fingerprint=manifest_value(run, "fingerprint"),
            model=manifest_value(run, "model", "name"),
            weights=manifest_value(run, "model", "weights"),
            state_sha256=manifest_value(run, "model").get("state_sha256"),
            attacks=tuple(spec["name"] for spec in manifest_value(run, "attacks")),
            is_complete=run.is_complete,
            commit=(run.manifest.get("provenance") or {}).get("commit"),
            diagnostics=diagnostics,
        )
        for run, diagnostics in zip(side.runs, side.diagnostics)
    ]


# --- words -------------------------------------------------------------------------------------------


def _reasons(
    claim: Claim,
    by_numbers: Outcome,
    failed: Sequence[Safeguard],
    findings: Findings,
    decisive: Sequence[Comparison],
) -> tuple[str, ...]:
    """Why, in sentences; `decisive` lists all rows of the first population, then what the others have of them."""
    matters = _points(claim.smallest_difference)
    sign = 1 if claim.direction == "more_robust" else -1
    more, less = (claim.treatment, claim.control) if sign > 0 else (claim.control, claim.treatment)
    by_row: dict[tuple[str, float], list[Comparison]] = {}
    for row in decisive:
        by_row.setdefault((row.norm, row.eps), []).append(row)
    columns = list(by_row.values())
    weakest = [min(column, key=lambda row: sign * row.difference) for column in columns]
    reasons = []
    if by_numbers != "inconclusive" and failed:
        reasons.append(f"By the numbers alone the claim would be {by_numbers}; that is withheld because a safeguard failed.")
        reasons += [guard.detail for guard in failed]

    shown = [weakest[column] for column in np.flatnonzero(findings.is_better)]
    harmful = [max(columns[c], key=lambda row: sign * row.difference) for c in np.flatnonzero(findings.is_worse)]
    lowest = min(decisive, key=lambda row: row.low if sign > 0 else -row.high)
    if by_numbers == "supported":
        reasons += [_in_every_population(more, less, row, sign) for row in _one_per_norm(shown, sign)]
        reasons.append(f"Nowhere can {more} be less robust by the {matters} that matter: all intervals lie above.")
    elif by_numbers == "refuted" and harmful:
        row = min(harmful, key=lambda row: sign * row.difference)
        reasons.append(_in_every_population(less, more, row, -sign))
        reasons.append(f"Nowhere is {more} significantly more robust.")
    elif by_numbers == "refuted":
        bound = max(decisive, key=lambda row: row.high if sign > 0 else -row.low)
        reasons.append(
            f"Nowhere is {more} more robust by the {matters} that matter: all intervals lie below, the highest reaching "
            f"{_points(bound.high if sign > 0 else -bound.low)} ({_place(bound)}, {_IN_WORDS[bound.population]})."
        )
    else:
        populations = {row.population for row in decisive}
        for population in POPULATIONS:
            if population not in populations:
                reasons.append(f"There are no {_IN_WORDS[population]}.")
        if findings.is_anywhere_better and findings.is_anywhere_worse:
            reasons.append("The curves cross: either model is significantly more robust somewhere.")
        reasons += [_in_every_population(more, less, row, sign) for row in _one_per_norm(shown, sign)]
        missing = {row.norm for row in weakest} - {row.norm for row in shown}
        if missing:
            where = " and ".join(sorted(missing))
            best = max((row for row in decisive if row.norm in missing), key=lambda row: sign * row.difference)
            reasons.append(
                f"In {where} no eps shows {more} more robust in every population, significantly and by {matters} or more; "
                f"its largest lead there is {_seen(best, sign)}."
            )
        if findings.may_matter_against.any():
            reasons.append(
                f"It is not ruled out that {more} is less robust by {matters} or more: its lead is {_seen(lowest, sign)}."
            )
        if findings.may_matter_for.any() and not shown:
            reasons.append(f"It is not ruled out that {more} is more robust by {matters} or more.")
        reasons += [f"Besides, a safeguard failed: {guard.detail}" for guard in failed]
    reasons += _power(claim, decisive)
    if by_numbers == "inconclusive":
        reasons += _too_few(claim, decisive, more, sign)
    reasons.append(_what_would_change(by_numbers, failed, findings, more, less))
    return tuple(reasons)


def _what_would_change(by_numbers: Outcome, failed: Sequence[Safeguard], findings: Findings, more: str, less: str) -> str:
    """What a reader who doubts the verdict could do about it."""
    favoured = more if by_numbers == "supported" else less
    names = " and ".join(dict.fromkeys(guard.name.replace("_", " ") for guard in failed))
    if by_numbers == "inconclusive" and findings.is_anywhere_better and findings.is_anywhere_worse:
        change = "no number of images, as either model is more robust somewhere; other weights may"
    elif by_numbers == "inconclusive":
        first = f"{names} in order, and then " if failed else ""
        change = f"{first}more images, on which smaller differences show, or attacks that tell the two apart"
    elif failed:
        change = f"with the same numbers and no failed safeguard ({names}) it is {by_numbers}"
    else:
        change = f"attacks that break more of {favoured} than those made here; other weights are another question"
    return f"What would change this verdict: {change}."


def _answered(safeguards: Sequence[Safeguard]) -> list[str]:
    """That a check failed, or is missing, must be seen, also where it does not matter."""
    return [f"Another run answers what would be doubted: {guard.detail}" for guard in safeguards if guard.answered_by]


def _left_out(evidence: Evidence) -> list[str]:
    """A claim may name its attacks and budgets; that others were left out must be seen."""
    ours, theirs = ({attack.name for attack in side.attacks} for side in evidence.sides)
    others = sorted((ours & theirs) - {attack.name for attack in evidence.attacks})
    budgets = [
        f"{attack.norm} {format_eps(eps, attack.norm)}"
        for attack in evidence.decisive
        for eps in attack.eps
        if eps > 0 and not is_unbounded(eps, attack.norm) and eps not in evidence.ladder(attack)
    ]
    return [
        f"The claim leaves out {what} that both models were evaluated {how}: {', '.join(left)}."
        for what, how, left in (("attacks", "with", others), ("budgets", "at", budgets))
        if left
    ]


def _not_said(claim: Claim) -> list[str]:
    """What a verdict rests on and the claim's file leaves to the defaults."""
    settings = ("significance", "power", "smallest_difference", "largest_clean_difference")
    taken = [f"{key} {getattr(claim, key):g}" for key in settings if key not in claim.model_fields_set]
    return [f"The claim does not say, so that the usual is taken: {', '.join(taken)}."] if taken else []


def _in_every_population(more: str, less: str, row: Comparison, sign: int) -> str:
    return (
        f"At {_place(row)}, {more} is more robust than {less} in every population, by least on "
        f"{_IN_WORDS[row.population]}: {_seen(row, sign, is_placed=False)}."
    )


def _one_per_norm(rows: Sequence[Comparison], sign: int) -> list[Comparison]:
    ordered = sorted(rows, key=lambda row: (row.norm, -sign * row.difference))
    return [next(group) for _, group in groupby(ordered, key=lambda row: row.norm)]


def _power(claim: Claim, decisive: Sequence[Comparison]) -> list[str]:
    """How small a difference could have been shown at each attack and budget, from the smallest to the largest."""
    parts = []
    for population in POPULATIONS:
        rows = [row for row in decisive if row.population == population]
        if not rows:
            continue
        found = sorted(row.smallest_detectable for row in rows if row.smallest_detectable is not None)
        if found:
            text = " to ".join(dict.fromkeys((_points(found[0]), _points(found[-1]))))
            if len(found) < len(rows):
                text += f" (at {len(rows) - len(found)} of {len(rows)} none at all)"
        else:
            text = "no difference at all"
        parts.append(f"{text} on {_IN_WORDS[population]} (n = {max(row.n for row in rows)})")
    return [
        f"Smallest difference that would be shown with probability {100 * claim.power:g} %, from budget to budget: "
        f"{', '.join(parts)}."
    ]


def _too_few(claim: Claim, decisive: Sequence[Comparison], more: str, sign: int) -> list[str]:
    """Rows that stand against *supported* because they have too few images to tell equal models from a worse one."""
    rows = [row for row in decisive if not _tells_equal_from_worse(claim, row, sign)]
    if not rows:
        return []
    row = min(rows, key=lambda row: row.n)
    # Tango's interval without a discordant image reaches -z^2 / (n + z^2).
    enough = math.floor(norm.ppf(1 - claim.significance / 2) ** 2 * (1 / claim.smallest_difference - 1)) + 1
    every = max(other.n for other in decisive)
    asked = f", of about {math.ceil(enough * every / row.n)} in all (now {every})" if row.n < every else ""
    return [
        f"That alone is not enough for *supported*: that {more} is nowhere less robust by "
        f"{_points(claim.smallest_difference)} must be shown in every row, and {len(rows)} of {len(decisive)} have too few "
        f"images to show it without a lead there, such as the {row.n} of {_place(row)} on {_IN_WORDS[row.population]}: at "
        f"least {enough} are needed{asked}, even where none tells the two apart."
    ]


def _tells_equal_from_worse(claim: Claim, row: Comparison, sign: int) -> bool:
    """Whether the row rules out a difference that matters, or would with as many discordant images, half of either model."""
    half = (row.treatment_only + row.control_only) // 2
    low, _ = paired_difference_interval(half, half, row.n, 1 - claim.significance)
    return bool(max(low, row.low if sign > 0 else -row.high) > -claim.smallest_difference)


def _place(row: Comparison) -> str:
    return f"eps {format_eps(row.eps, row.norm)} in {row.norm} ({row.attack})"


def _seen(row: Comparison, sign: int, is_placed: bool = True) -> str:
    low, high = (row.low, row.high) if sign > 0 else (-row.high, -row.low)
    text = f"{_points(sign * row.difference)} (interval {100 * low:.1f} to {100 * high:.1f}, p = {row.p_holm:.2g} after Holm)"
    return f"{text} at {_place(row)} on {_IN_WORDS[row.population]}" if is_placed else text


def _points(fraction: float) -> str:
    return f"{100 * fraction:.3g} points"
