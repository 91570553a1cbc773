"""What tells two functions apart, and what does not."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from lrrobust.loaded_code import describe_callable


def scaled(x, by=2):
    return by * x


def nested(by):
    def inner(x):
        return by * x

    return inner


def compiled(body, steps=7, g=scaled):
    return eval(f"lambda x: {body}", {"__name__": "mine", "steps": steps, "g": g})


def circular(by):
    def inner(x):
        return inner(by * x)

    return inner


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x

    def twice(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "make, one, other",
    [
        (nested, 2, 3),
        (lambda by: partial(scaled, by=by), 3, 4),
        (lambda by: partial(scaled, by), 3, 4),
        (Scaled, 2, 3),
        (lambda by: nested(nested(by)), 2, 3),
        (lambda by: partial(nested(by), 1), 2, 3),
        (lambda by: Scaled(by).twice, 2, 3),
        (lambda name: getattr(Scaled(2), name), "twice", "__call__"),
        (lambda by: nested(torch.full((9,), by)), 2, 3),
        (lambda by: nested({1: [nested(by)]}), 2, 3),
        (lambda by: nested(torch.nn.Threshold(0, by)), 2, 3),
        (circular, 2, 3),
        (compiled, "x in {1, 2}", "x in {1, 3}"),
        (compiled, "[g(x) for _ in range(steps)]", "g(x)"),
        (lambda steps: compiled("[x for _ in range(steps)]", steps), 7, 8),
        (lambda by: compiled("g(x)", g=nested(by)), 7, 8),
    ],
)
def test_code_and_what_it_was_made_with_tell(make, one, other):
    assert describe_callable(make(one)) == describe_callable(make(one)) != describe_callable(make(other))


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
