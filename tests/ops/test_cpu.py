"""What the compiled code of the CPU does when its folder on disk fails."""

import importlib.util
import shutil
import threading
import time

import numba
import pytest
import torch

from lrrobust.ops import _cpu


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a function as at the start of a process, with its files in a folder of the test."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_cpu._Cache, "_is_failure_said", False)
    path = tmp_path / "twice.py"
    path.write_text("def twice(x):\n    return 2 * x\n")

    def compiled():
        spec = importlib.util.spec_from_file_location("twice", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _cpu._compiled(module.twice)

    return compiled


def hits(function):
    assert function(21) == 42
    return sum(function.stats.cache_hits.values())


@pytest.mark.parametrize("damage", [b"", b"\x80\x04half", bytes(100)])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damaged_files_are_made_anew(compiled, tmp_path, suffix, damage):
    assert hits(compiled()) == 0 and hits(compiled()) == 1
    (victim,) = tmp_path.rglob(f"*.{suffix}")
    victim.write_bytes(damage)
    assert hits(compiled()) == 0
    assert hits(compiled()) == 1


def test_a_folder_that_cannot_be_written_costs_one_line(compiled, tmp_path, capsys):
    functions = [compiled(), compiled()]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert [hits(function) for function in functions] == [0, 0]
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (Not a directory): the next start compiles again" in line


def test_no_folder_at_all(compiled, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "__init__", refuse)
    assert hits(compiled()) == 0 and capsys.readouterr().err == ""


def test_after_an_error_nobody_begins_another_piece():
    begun = []

    def work(piece, start, stop):
        begun.append(piece)
        if threading.current_thread() is threading.main_thread():
            raise ValueError("in the caller's piece")
        time.sleep(0.1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="in the caller's piece"):
            _cpu._Threads().run(work, 32, 16)
    finally:
        torch.set_num_threads(before)
    # Whoever had begun has ended, and no more of them follow.
    known = len(begun)
    time.sleep(0.3)
    assert len(begun) == known <= 3
