"""What safeguards find, and runs of which they find nothing."""

import math

INF = math.inf
PIXEL = 1 / 255
GOOD = {
    "pgd": dict(distances=[INF, PIXEL, PIXEL, 0]),
    "cw": dict(distances=[0.5, 0.1, 0.1, 0], norm="l2", eps=(0.2, INF)),
}


def named(safeguards, name):
    return [safeguard for safeguard in safeguards if safeguard.name == name]


def failed(safeguards):
    return [(guard.name, guard.attack, guard.withholds) for guard in safeguards if guard.passed is False]
