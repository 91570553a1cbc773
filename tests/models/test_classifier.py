import re

import pytest
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.models import Classifier


def test_defaults():
    module = nn.Identity()
    classifier = Classifier(module, ["cat", "dog"], 32)
    assert classifier.module is module
    assert classifier.classes == ("cat", "dog")
    assert (classifier.resize_size, classifier.interpolation, classifier.weights) == (None, "bilinear", "")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"module": len}, "needs a torch.nn.Module, got builtin_function_or_method"),
        ({"classes": "cat"}, "names of its classes, got the text 'cat'"),
        ({"classes": ("cat", ...)}, "names of its classes as texts, got Ellipsis among them"),
        ({"classes": range(10)}, "names of its classes as texts, got 0 among them"),
        ({"classes": ("cat",)}, "at least two classes, all different, got 1"),
        ({"classes": ("cat", "dog", "cat")}, "at least two classes, all different, got 3"),
        ({"input_size": 0}, "1 <= input_size <= resize_size <= 1000000, got self.input_size=0, self.resize_size=None"),
        ({"resize_size": 31}, "got self.input_size=32, self.resize_size=31"),
        ({"input_size": 2**32}, "<= 1000000, got self.input_size=4294967296"),
        ({"resize_size": 10**20}, "<= 1000000, got self.input_size=32, self.resize_size=10"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change, message):
    arguments = {"module": nn.Identity(), "classes": ("cat", "dog"), "input_size": 32, **change}
    with pytest.raises(ModelError, match=re.escape(message)):
        Classifier(**arguments)
