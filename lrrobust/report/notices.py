"""What readers of a run's numbers must know before they trust them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrrobust.results import Run, manifest_value
from lrrobust.stats import wilson_interval

if TYPE_CHECKING:
    import pandas as pd

#: Part metadata that the engine writes only where something is wrong, and what it means.
_WARNINGS = {
    "flat": "the gradient of the model's logits was zero: attacks that follow it find nothing, however fragile the model is",
    "nonfinite_gradients": "gradients were infinite or NaN: the attack was not at full strength",
    "probabilities": "the model returns probabilities instead of logits: attacks are weakened",
    "randomised": "the model's logits are random: images stand or break by chance, and attacks may overstate its robustness "
    "unless they average over enough passes",
}


def warnings_of(run: Run) -> list[str]:
    """What the engine noticed while it computed the run and readers of its numbers must know."""
    noticed = {key for part in run.part_metadata.values() for key in part}
    averaged = min((spec.get("eot_iter", 1) for spec in manifest_value(run, "attacks")), default=1)
    here = {"randomised": f" (--eot-iter; here {averaged})"}
    return [text + here.get(key, "") for key, text in _WARNINGS.items() if key in noticed]


def warnings_with_rejections(run: Run) -> list[str]:
    """The same, and which attacks proposed nothing that counts, of which a verdict bears a few."""
    is_rejected = run.rows["outcome"] == "rejected"
    if not is_rejected.any():
        return warnings_of(run)
    by_image = run.rows.assign(is_rejected=is_rejected).groupby(["attack", "index"], observed=True, sort=False)
    of_images = by_image[["is_rejected", "is_broken"]].any()
    left = of_images["is_rejected"] & ~of_images["is_broken"]
    return warnings_of(run) + [
        f"for {count} images {attack} last proposed something outside of ball or box: they count as robust, and may not be"
        for attack, count in left.groupby("attack", observed=True, sort=False).sum().items()
        if count
    ]


def doubt_accuracy(summary: pd.DataFrame, num_classes: int) -> str | None:
    """What to ask where a run's clean accuracy is no better than guessing: mostly labels or preprocessing are wrong."""
    clean_accuracy, n = summary[["clean_accuracy", "n"]].iloc[0]
    correct = round(clean_accuracy * n)
    if wilson_interval(correct, int(n))[0] > 1 / num_classes:
        return None
    return (
        f"{correct} of {int(n)} images are correct when clean, as guessing among {num_classes} classes might be: is the class "
        "list in the order of the logits, are the weights trained, does the network normalise as it did in training"
    )


def mixed_metadata(run: Run) -> dict[str, list[str]]:
    """The metadata in which the parts of a run differ, such as devices, with their values."""
    keys = {key for metadata in run.part_metadata.values() for key in metadata} - _WARNINGS.keys()
    values = {key: sorted({part.get(key, "unknown") for part in run.part_metadata.values()}) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}
