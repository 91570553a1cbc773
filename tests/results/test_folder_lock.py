import multiprocessing

import pytest

from lrrobust.errors import StoreError
from lrrobust.results import folder_lock
from lrrobust.results.folder_lock import FolderLock

pytestmark = pytest.mark.skipif(folder_lock.fcntl is None, reason="needs flock")


def test_alone_or_not_at_all(tmp_path):
    first = FolderLock(tmp_path, is_shared=False)
    assert first.is_alone
    for is_shared in (False, True):
        with pytest.raises(StoreError, match="another lrrobust process"):
            FolderLock(tmp_path, is_shared=is_shared)
    first.close()
    first.close()
    FolderLock(tmp_path, is_shared=False).close()


def test_those_that_share_come_in_together_once_it_is_set_up(tmp_path):
    first = FolderLock(tmp_path, is_shared=True)
    assert first.is_alone
    first.share()
    assert not first.is_alone
    second = FolderLock(tmp_path, is_shared=True)
    assert not second.is_alone
    with pytest.raises(StoreError, match="other lrrobust processes share the work in .*--share"):
        FolderLock(tmp_path, is_shared=False)
    first.close()
    with pytest.raises(StoreError, match="share the work"):
        FolderLock(tmp_path, is_shared=False)
    second.close()
    assert FolderLock(tmp_path, is_shared=True).is_alone


def _take_shared(folder, results):
    lock = FolderLock(folder, is_shared=True)
    results.put(lock.is_alone)
    results.close()
    results.join_thread()


def test_the_second_waits_while_the_first_sets_up(tmp_path):
    first = FolderLock(tmp_path, is_shared=True)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    second = context.Process(target=_take_shared, args=(tmp_path, results))
    second.start()
    second.join(1.5)
    assert second.is_alive() and results.empty()
    first.share()
    assert results.get(timeout=30) is False
    second.join(30)


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    import errno

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    assert not FolderLock(tmp_path, is_shared=False).is_alone
    assert "cannot be locked" in caplog.text
    caplog.clear()
    # Those that share know what to do without.
    lock = FolderLock(tmp_path, is_shared=True)
    lock.share()
    lock.close()
    assert not lock.is_alone and not caplog.text
