"""What tells two functions apart, and what does not."""

import subprocess
import sys
from functools import partial

import pytest

from lrrobust.loaded_code import describe_callable


def scaled(x, by=2):
    return by * x


def nested(by):
    def inner(x):
        return by * x

    return inner


def calling(function):
    return lambda x: function(x)


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


@pytest.mark.parametrize(
    "same, other",
    [
        ((nested(2), nested(2)), nested(3)),
        ((partial(scaled, by=3), partial(scaled, by=3)), partial(scaled, by=4)),
        ((partial(scaled, 3), partial(scaled, 3)), partial(scaled, 4)),
        ((Scaled(2), Scaled(2)), Scaled(3)),
        ((calling(nested(2)), calling(nested(2))), calling(nested(3))),
        ((partial(nested(2), 1), partial(nested(2), 1)), partial(nested(3), 1)),
        ((lambda x: {1, 2} and x, lambda x: {1, 2} and x), lambda x: {1, 3} and x),
        ((scaled, scaled), lambda x, by=2: by * x + 1),
    ],
)
def test_code_and_what_it_was_made_with_tell(same, other):
    first, second = map(describe_callable, same)
    assert first == second != describe_callable(other)


def test_is_the_same_in_every_process():
    said = (
        "from functools import partial\nfrom lrrobust.loaded_code import describe_callable\n"
        "print(describe_callable(partial(lambda x, y={3, 4}: x in {'a', 'b', 'c'}, 1)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", said], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
