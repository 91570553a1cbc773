import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os
from lrrobust.process_settings import settle_process
settle_process()
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]})
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
mapped = libc.mallinfo2().hblks
block = libc.malloc(64 << 20)
mapped = libc.mallinfo2().hblks - mapped
libc.free(block)
print(os.environ["GOMP_SPINCOUNT"], mapped, libc.mallinfo2().fordblks >= 64 << 20)
"""


def run(**environment):
    environment = {**{k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}, **environment}
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc what it does")
def test_large_blocks_are_kept():
    assert run() == ["20000", "0", "True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc what it does")
def test_what_the_user_set_stays():
    assert run(GOMP_SPINCOUNT="7")[0] == "7"
