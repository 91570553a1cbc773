"""Networks, their weights, and the registry that turns a name into a classifier."""

from lrrobust.models.classifier import Classifier
from lrrobust.models.registry import build_network, load_classifier

__all__ = ["Classifier", "build_network", "load_classifier"]
