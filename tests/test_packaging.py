"""What the README promises about installing, checked against the files that do it."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def read_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^    (python3 -m venv .*)$", text, flags=re.MULTILINE)


def pins():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: r for r in requirements if r.marker is None or r.marker.evaluate()}


def project():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.DOTALL | re.MULTILINE).group(1)
    return [Requirement(line) for line in re.findall(r'"(.+?)"', block)]


def test_readme_opens_with_two_commands_and_ci_runs_the_second():
    main_job, tests = read_commands()
    assert main_job.endswith("lrrobust eval --model lr_resnet50 --attack pgd")
    assert tests.endswith("-m pytest")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", project(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    if requirement.name == "torchattacks":
        command = read_commands()[0]
        assert f"--no-deps torchattacks{requirement.specifier}" in command
        return
    (pin,) = pins()[requirement.name].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_triton_is_the_one_that_torch_works_with():
    pin = pins().get("triton")
    asked = [r for r in map(Requirement, metadata.requires("torch")) if r.name == "triton"]
    if pin is None or not asked or not pins()["torch"].specifier.contains(metadata.version("torch")):
        pytest.skip("torch is a build without CUDA or another version, or this is not Linux on x86_64")
    assert asked[0].specifier == pin.specifier


def test_the_wheel_is_tried_by_ci_and_has_the_attacks():
    assert '"attacks_configs" = "lrrobust/attacks_configs"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "pip wheel" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_version_is_one():
    from lrrobust import __version__

    try:
        assert metadata.version("lrrobust") == __version__
    except metadata.PackageNotFoundError:
        pytest.skip("not installed, imported from the checkout")


def test_tracked_files_stay_small():
    trained = ROOT / "lrrobust" / "models" / "trained"
    assert all(path.stat().st_size <= 25e6 for path in trained.glob("*"))
