"""Networks, their weights, and the registry that turns a name into a classifier."""

from lrrobust.models.classifier import Classifier
from lrrobust.models.registry import build_network, load_classifier, name_classes

__all__ = ["Classifier", "build_network", "load_classifier", "name_classes"]
