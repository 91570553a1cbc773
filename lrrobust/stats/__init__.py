"""Numbers that summarise verdicts: arrays in, numbers out.

- `proportions`: one proportion and its interval; `balanced`: with every class counting alike.
- `paired`: two models on the same images: interval, test, family of tests, power.
- `curves`: area under a robustness curve.
- `distances`: nearest adversarial images.
- `passes`: what attacks spent on each image.
"""

from lrrobust.stats.balanced import BalancedShare, balanced_share
from lrrobust.stats.curves import bootstrap_mean_interval, log_area_weights
from lrrobust.stats.distances import PairedDistances, compare_distances, median_with_failures, survival
from lrrobust.stats.paired import (
    discrete_bonferroni_level,
    holm,
    mcnemar_p_value,
    mcnemar_power,
    paired_difference_interval,
    smallest_detectable_difference,
)
from lrrobust.stats.passes import curve_over_passes, passes_up_to
from lrrobust.stats.proportions import binomial_p_value, wilson_interval

__all__ = [
    "BalancedShare",
    "PairedDistances",
    "balanced_share",
    "binomial_p_value",
    "bootstrap_mean_interval",
    "compare_distances",
    "curve_over_passes",
    "discrete_bonferroni_level",
    "holm",
    "log_area_weights",
    "mcnemar_p_value",
    "mcnemar_power",
    "median_with_failures",
    "paired_difference_interval",
    "passes_up_to",
    "smallest_detectable_difference",
    "survival",
    "wilson_interval",
]
