import json
import os
import subprocess
from importlib import metadata

import pytest
import torch

import lrrobust
from lrrobust.provenance import describe_code, describe_environment, describe_processor, find_commit


def test_environment_is_ready_for_json():
    described = describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(described)) == described
    assert described["device"] == "cpu" and described["lrrobust"] == lrrobust.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["versions"]["torch"] == metadata.version("torch")
    assert described["versions"]["torchattacks"] == metadata.version("torchattacks")


def test_package_that_is_not_installed_has_no_version(monkeypatch):
    from lrrobust import provenance

    monkeypatch.setattr(provenance, "_PACKAGES", ("no-such-package",))
    assert describe_environment(torch.device("cpu"))["versions"] == {"no-such-package": None}


def test_accelerator_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    assert describe_environment(torch.device("cuda"))["device"] == "cuda (Some GPU)"


def test_processor():
    described = describe_processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert described.endswith(f", {cores} cores") and not described.startswith(",")


def find_commit_anew():
    """As a process that starts now would."""
    find_commit.cache_clear()
    return find_commit()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout that seems to hold this package, with nothing committed yet."""
    (tmp_path / "lrrobust").mkdir()
    (tmp_path / "lrrobust" / "__init__.py").write_text("")
    monkeypatch.setattr(lrrobust, "__file__", str(tmp_path / "lrrobust" / "__init__.py"))
    yield tmp_path
    find_commit.cache_clear()


def _git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_of_a_checkout(checkout):
    assert find_commit_anew() is None
    _git(checkout, "init", "-q")
    assert find_commit_anew() is None
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-qm", "first")
    commit = _git(checkout, "rev-parse", "HEAD")
    assert len(commit) == 40 and find_commit_anew() == commit
    # Neither files beside the package, such as reports made anew, nor
    (checkout / "report.md").write_text("old")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-qm", "second")
    (checkout / "report.md").write_text("new")
    commit = _git(checkout, "rev-parse", "HEAD")
    assert find_commit_anew() == commit
    # new files, such as results, are a change of the code.
    (checkout / "notes.txt").write_text("new")
    assert find_commit_anew() == commit
    # Attacks lie beside the package, and a file that nobody has added counts like any other.
    (checkout / "attacks_configs").mkdir()
    (checkout / "attacks_configs" / "pgd.yaml").write_text("steps: 2")
    assert find_commit_anew() == f"{commit}-dirty"
    (checkout / "attacks_configs" / "pgd.yaml").unlink()
    assert find_commit_anew() == commit
    (checkout / "lrrobust" / "__init__.py").write_text("changed = True\n")
    assert find_commit_anew() == f"{commit}-dirty"
    assert describe_code() == f"lrrobust {lrrobust.__version__}, commit {commit} with uncommitted changes"


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    (checkout / ".git").mkdir()

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert find_commit_anew() is None


def test_installed_into_someone_elses_checkout(tmp_path, monkeypatch):
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "site-packages" / "lrrobust").mkdir(parents=True)
    monkeypatch.setattr(lrrobust, "__file__", str(tmp_path / "site-packages" / "lrrobust" / "__init__.py"))
    assert find_commit_anew() is None
