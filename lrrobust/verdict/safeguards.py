"""What evidence must pass before it may decide: were the two models treated alike, and did the attacks work?

A failed attack makes a model look robust. Doubts about one model's attacks therefore withhold the verdict that would
rest on its robustness, and no other: *supported* for the model the claim calls more robust, *refuted* for the other.
"""

from __future__ import annotations

from lrrobust.verdict.comparability import check_comparability
from lrrobust.verdict.evidence import Evidence
from lrrobust.verdict.other_attacks import check_other_attacks
from lrrobust.verdict.records import Safeguard
from lrrobust.verdict.soundness import check_model


def check_evidence(evidence: Evidence) -> tuple[Safeguard, ...]:
    """All safeguards, in the order of reading."""
    is_more = evidence.claim.direction == "more_robust"
    return (
        *check_comparability(evidence),
        *check_other_attacks(evidence),
        *check_model(evidence, evidence.treatment, is_claimed=is_more),
        *check_model(evidence, evidence.control, is_claimed=not is_more),
    )
