"""The transfer matrix and the comparison with white-box attacks, on runs made of nothing but distances."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_rows import build_row, to_frame

from lrrobust.results import SCHEMA_VERSION, Run
from lrrobust.stats import mcnemar_p_value
from lrrobust.transfer import ANY_SOURCE, SIGNIFICANCE, TransferTest, compare_with_white_box, find_masking, transfer_matrix
from lrrobust.transfer_report import find_transfer, transfer_table, write_transfer

LADDER = (1 / 255, 2 / 255)
INF = math.inf


def model(name, weights="V1"):
    return {"name": name, "weights": weights, "state_sha256": f"{name}{weights}"}


def build_run(target, surrogate, distances, *, attack="pgd", ladder=LADDER, steps=20, sha256="cd" * 32, name=None):
    """A run of one linf attack: what it needs for each image, 0 wrong when clean, infinity never broken."""
    rows = [
        build_row(index, attack, "linf", eps, distance or None) for eps in ladder for index, distance in enumerate(distances)
    ]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": "ab" * 32,
        "model": target,
        "dataset": {"name": "sample", "sha256": sha256, "n": len(distances)},
        "attacks": [{"name": attack, "norm": "linf", "steps": steps}],
    }
    if surrogate is not None:
        manifest["surrogate"] = surrogate
    folder = Path("/results") / (name or f"{target['name']}-{surrogate and surrogate['name']}")
    return Run(folder, manifest, to_frame(rows), True, {})


A, B = model("A"), model("B")
NEAR, FAR = 0.9 / 255, 1.9 / 255


def accuracy(matrix, source, target, eps):
    (row,) = matrix[(matrix.source == source) & (matrix.target == target) & (matrix.eps == eps)].itertuples()
    return row.robust_accuracy, row.n


class TestMatrix:
    RUNS = (
        build_run(A, None, [0, NEAR, FAR, INF, INF]),
        build_run(B, None, [NEAR, NEAR, NEAR, FAR, INF]),
        build_run(A, B, [0, FAR, INF, NEAR, INF]),
        build_run(B, A, [FAR, INF, INF, INF, INF]),
    )

    def test_every_pair_and_the_worst_case(self):
        matrix = transfer_matrix(self.RUNS)
        near, far = LADDER
        assert accuracy(matrix, "A", "A", near) == (0.6, 5) and accuracy(matrix, "A", "A", far) == (0.4, 5)
        assert accuracy(matrix, "B", "A", near) == (0.6, 5) and accuracy(matrix, "B", "A", far) == (0.4, 5)
        assert accuracy(matrix, ANY_SOURCE, "A", near) == (0.4, 5) and accuracy(matrix, ANY_SOURCE, "A", far) == (0.2, 5)
        assert accuracy(matrix, "A", "B", near) == (1.0, 5) and accuracy(matrix, "A", "B", far) == (0.8, 5)
        assert set(matrix["clean_accuracy"][matrix.target == "A"]) == {0.8}
        assert len(matrix) == 2 * 2 * 3

    def test_without_transfer_there_is_none(self, tmp_path):
        assert transfer_matrix(self.RUNS[:2]).empty and not transfer_table(transfer_matrix(self.RUNS[:2])).rows
        assert write_transfer(self.RUNS[:2], tmp_path) == [] and not list(tmp_path.iterdir())

    def test_images_of_one_source_judged_twice_count_as_broken_by_either(self):
        again = build_run(A, B, [0, INF, NEAR, INF, INF], name="again")
        matrix = transfer_matrix([*self.RUNS, again])
        assert accuracy(matrix, "B", "A", LADDER[0]) == (0.4, 5)

    def test_other_images_are_another_matrix(self):
        elsewhere = build_run(A, None, [NEAR] * 5, sha256="ef" * 32)
        assert accuracy(transfer_matrix([*self.RUNS, elsewhere]), "A", "A", LADDER[0]) == (0.6, 5)

    def test_weights_tell_models_of_one_name_apart(self):
        other = model("A", "V2")
        matrix = transfer_matrix([self.RUNS[0], build_run(A, other, [0, INF, INF, INF, INF])])
        assert set(matrix["source"]) == {"A (V1)", "A (V2)", ANY_SOURCE}

    def test_files(self, tmp_path):
        paths = write_transfer(self.RUNS, tmp_path)
        assert [path.name for path in paths] == ["transfer.csv", "transfer.md", "transfer.tex"]
        assert len(pd.read_csv(paths[0])) == 12
        text = paths[1].read_text()
        assert "| pgd | linf | 1/255 | A | 60.0 | 100.0 |" in text and "| pgd | linf | 1/255 | B | 60.0 | 40.0 |" in text
        assert f"| pgd | linf | 1/255 | {ANY_SOURCE} | 40.0 | 40.0 |" in text
        assert "Transfer beats the white-box attacks nowhere" in text
        assert text.index("| 1/255 | A |") < text.index("| 1/255 | B |") < text.index(f"| 1/255 | {ANY_SOURCE} |")


class TestMasking:
    def test_counts_pairs_of_images(self):
        white, transferred = build_run(A, None, [0, NEAR, FAR, INF, INF]), build_run(A, B, [0, FAR, NEAR, NEAR, INF])
        near, far = compare_with_white_box([white, transferred])
        assert (near.eps, near.n, near.transfer_only, near.white_box_only) == (LADDER[0], 5, 2, 1)
        assert (far.transfer_only, far.white_box_only) == (1, 0)
        assert near.p_value == mcnemar_p_value(2, 1, alternative="greater")

    def test_an_attack_that_transfer_beats_is_found(self):
        masked, open_to_others = [INF] * 30 + [NEAR] * 3, [NEAR] * 20 + [INF] * 13
        (finding,) = find_transfer([build_run(A, None, masked), build_run(A, B, open_to_others)])
        assert not finding.passed and finding.target == A
        assert "images made on B break 20 of 33 images that no attack on A itself breaks" in finding.detail
        assert "attacks on A itself 3 that those do not (one-sided p = 0.00024, 2 comparisons)" in finding.detail

    def test_a_sound_attack_is_not_blamed(self):
        white, transferred = [NEAR] * 30 + [INF] * 10, [INF] * 10 + [NEAR] * 15 + [INF] * 12 + [NEAR] * 3
        (finding,) = find_transfer([build_run(A, None, white), build_run(A, B, transferred)])
        assert finding.passed and "nowhere" in finding.detail

    def test_chance_seldom_blames(self):
        generator = np.random.default_rng(0)
        # Two eps, at each 40 discordant images that fall to either side alike.
        only = generator.binomial(40, 0.5, (3000, 2))
        p_values = mcnemar_p_value(only, 40 - only, alternative="greater")
        blamed = [
            find_masking([TransferTest(A, B, "linf", eps, 60, 0, 0, p) for eps, p in zip(LADDER, pair)]) is not None
            for pair in p_values.tolist()
        ]
        assert 0 < np.mean(blamed) <= SIGNIFICANCE

    def test_only_equal_attacks_are_compared(self):
        white = build_run(A, None, [INF] * 30, steps=1)
        assert compare_with_white_box([white, build_run(A, B, [NEAR] * 30)]) == []
        assert compare_with_white_box([build_run(A, B, [NEAR] * 30)]) == []
        other_weights = build_run(model("A", "V2"), None, [INF] * 30)
        assert compare_with_white_box([other_weights, build_run(A, B, [NEAR] * 30)]) == []

    def test_all_white_box_attacks_together_defend_the_model(self):
        more = build_run(A, None, [NEAR] * 30, attack="cw", name="more")
        runs = [build_run(A, None, [INF] * 30), build_run(A, B, [NEAR] * 30), more]
        (finding,) = find_transfer(runs)
        assert finding.passed

    @pytest.mark.parametrize("unfinished", [0, 1])
    def test_only_images_finished_by_both_count(self, unfinished):
        sizes = [40, 40]
        sizes[unfinished] = 25
        runs = [build_run(A, who, [INF if who is None else NEAR] * size) for who, size in zip((None, B), sizes)]
        assert {test.n for test in compare_with_white_box(runs)} == {25}
