"""Sets adversarially trained weights beside those that they came from, image by image, and writes robust_accuracy.csv.

    python reports/adversarial_training/compare.py reports/runs/adversarial_training reports/adversarial_training/robust_accuracy.csv

The folder holds runs of the same attacks at the same eps on the same images: of each model one with the weights of the
package, and one with those of the demonstration. An image counts as robust where it is to all attacks of its run.
"""

import sys
from pathlib import Path

import pandas as pd

from lrrobust.results import find_runs, load_run
from lrrobust.stats import mcnemar_p_value, paired_difference_interval, wilson_interval


def read(folder: Path) -> pd.DataFrame:
    """One row an image: is it right when clean, and robust."""
    run = load_run(folder)
    if not run.is_complete:
        raise SystemExit(f"{folder} is not finished")
    rows = run.rows.groupby("key").agg(is_correct=("is_clean_correct", "all"), is_broken=("is_broken", "any"))
    about = run.manifest
    rows.attrs = {
        "model": about["model"]["name"], "weights": about["model"]["weights"], "images_sha256": about["dataset"]["sha256"],
        "attacks": "+".join(spec["name"] for spec in about["attacks"]), "eps": about["attacks"][0]["eps"][0],
        "state_sha256": about["model"]["state_sha256"], "commit": about["provenance"]["commit"],
    }  # fmt: skip
    return rows.sort_index()


def describe(rows: pd.DataFrame, natural: pd.DataFrame | None) -> dict[str, object]:
    robust, n = ~rows["is_broken"].astype(bool), len(rows)
    low, high = wilson_interval(int(robust.sum()), n)
    found = {
        **rows.attrs, "n": n, "clean_accuracy": rows["is_correct"].mean(), "robust_accuracy": robust.mean(), "ci_low": low,
        "ci_high": high, "survivors_of_correct": robust.sum() / rows["is_correct"].sum(),
    }  # fmt: skip
    if natural is not None:
        before = ~natural["is_broken"].astype(bool)
        gained, lost = int((robust & ~before).sum()), int((before & ~robust).sum())
        low, high = paired_difference_interval(gained, lost, n)
        found |= {"gained_images": gained, "lost_images": lost, "difference_low": float(low), "difference_high": float(high)}
        found["mcnemar_p"] = float(mcnemar_p_value(gained, lost))
    return found


def main(folder: str, target: str) -> None:
    runs = [read(path) for path in find_runs(Path(folder))]
    if len({(run.attrs["images_sha256"], run.attrs["attacks"], run.attrs["eps"]) for run in runs}) != 1:
        raise SystemExit(f"{folder}: expected runs of the same images, attacks and eps")
    table = []
    for name in sorted({run.attrs["model"] for run in runs}):
        natural, trained = sorted(
            (run for run in runs if run.attrs["model"] == name), key=lambda run: run.attrs["weights"] != "TINY_IMAGENET_V1"
        )
        assert list(natural.index) == list(trained.index)
        table += [describe(natural, None), describe(trained, natural)]
    pd.DataFrame(table).astype({"gained_images": "Int64", "lost_images": "Int64"}).to_csv(target, index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
