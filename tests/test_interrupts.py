import os
import signal
import subprocess
import sys

import pytest

from lrrobust.interrupts import interrupts_held_back

NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]


def run(program, *arguments):
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_signals_are_raised(name):
    done = run(
        "import os, signal, sys\nfrom lrrobust.interrupts import Stopped, raise_on_signals\nraise_on_signals()\n"
        "try:\n    os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n    signal.pause()\n"
        "except KeyboardInterrupt as stopped:\n    print(stopped, isinstance(stopped, Stopped))\n",
        name,
    )
    assert done.stdout == f"{name} True\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ignored_stays_ignored(name):
    """As nohup and shells do to what runs in the background."""
    done = run(
        "import os, signal, sys\nfrom lrrobust.interrupts import raise_on_signals\nsignum = getattr(signal, sys.argv[1])\n"
        "signal.signal(signum, signal.SIG_IGN)\nraise_on_signals()\nos.kill(os.getpid(), signum)\nprint('on')\n",
        name,
    )
    assert done.stdout == "on\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_children_end_as_by_default():
    done = run(
        "import os, signal\nfrom lrrobust.interrupts import raise_on_signals\nraise_on_signals()\nend, begin = os.pipe()\n"
        "child = os.fork()\nif not child:\n    os.write(begin, b'x')\n    signal.pause()\nos.read(end, 1)\nos.kill(child, "
        "signal.SIGTERM)\nprint(os.waitpid(child, 0)[1])\n"
    )
    assert done.stdout == f"{int(signal.SIGTERM)}\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_held_back_to_the_end_of_the_block(name):
    signum, met = getattr(signal, name), []
    before = signal.signal(signum, lambda *arguments: met.append(arguments[0]))
    try:
        with interrupts_held_back() as received:
            os.kill(os.getpid(), signum)
            assert [arguments[0] for arguments in received] == [signum] and not met
        assert met == [signum]
    finally:
        signal.signal(signum, before)
