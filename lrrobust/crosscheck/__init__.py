"""The same model, images and budgets through other people's libraries, beside ours."""

from lrrobust.crosscheck.compare import Comparison, choose_budgets, choose_peers, crosscheck, crosscheck_evaluation

__all__ = ["Comparison", "choose_budgets", "choose_peers", "crosscheck", "crosscheck_evaluation"]
