"""The action and the examples for other people's CI: read as their readers do, and the action's script really run."""

import json
import os
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from own_process import environment, run_process
from typer.testing import CliRunner

from lrrobust import cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "actions" / "lrrobust-check"


def load(name):
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def step():
    (step,) = load("action.yml")["runs"]["steps"]
    return step


def run_script(step, cwd, **inputs):
    """The step's script as GitHub's runner starts it."""
    given = {
        "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(cwd / "summary.md"), "BASELINE": "b.json", "ARGUMENTS": "",
        "JUNIT": "r.xml", "JSON": "r.json", "PYTHON": sys.executable, **inputs,
    }  # fmt: skip
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    return run_process(*command, cwd=cwd, env=environment(**given))


def test_inputs_reach_the_script_as_variables_only(step):
    assert "${{" not in step["run"]
    inputs = load("action.yml")["inputs"]
    assert step["env"] == {name.upper(): f"${{{{ inputs.{name} }}}}" for name in inputs}
    assert all("default" in each or each["required"] for each in inputs.values())


def test_script_hands_over_arguments_as_they_are(step, tmp_path):
    shim = tmp_path / "python"
    shim.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > seen\nexit 1\n')
    shim.chmod(0o755)
    hostile = "--dataset\na b; touch hacked $(touch hacked) `touch hacked` '\"*\n"
    done = run_script(step, tmp_path, ARGUMENTS=hostile, BASELINE="-b $HOME.json", PYTHON=str(shim))
    assert done.returncode == 1, done.stderr
    seen = (tmp_path / "seen").read_text().split("\0")[:-1]
    assert seen[:5] == ["-m", "lrrobust", "check", "--dataset", hostile.splitlines()[1]]
    assert seen[-2:] == ["--", "-b $HOME.json"]
    assert not (tmp_path / "hacked").exists()


def test_a_process_that_ends_without_a_result_has_not_passed(step, tmp_path):
    shim = tmp_path / "python"
    shim.write_text("#!/usr/bin/env bash\nexit 0\n")
    shim.chmod(0o755)
    (tmp_path / "r.json").write_text("of an earlier check")
    done = run_script(step, tmp_path, PYTHON=str(shim))
    assert done.returncode == 2 and "without a result" in done.stdout


def test_script_fails_with_the_exit_code(step, tmp_path):
    """A whole check through the script: a damaged baseline needs no model to be found."""
    (tmp_path / "b.json").write_text("{")
    done = run_script(step, tmp_path, ARGUMENTS="--weights-may-change\n")
    assert done.returncode == 2
    assert done.stderr.startswith("error: baseline b.json: ")


def test_script_annotates_and_writes_files(step, tmp_path):
    gate = Path(__file__).parent / "gate"
    document = json.loads((gate / "baseline.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(document))
    draw = "import test_command, pathlib; test_command.make_workplace(pathlib.Path('.'), 50)"
    found = environment(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    run_process(sys.executable, "-c", draw, cwd=tmp_path, env=found, check=True)
    done = run_script(step, tmp_path, ARGUMENTS="--device\ncpu\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("::notice title=Robustness::no fall beyond chance")
    assert (tmp_path / "summary.md").read_text().startswith("### Robustness: passed")
    assert ElementTree.parse(tmp_path / "r.xml").getroot().get("tests") == "39"
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "passed"


def test_examples_call_what_exists():
    (job,) = load("example-workflow.yml")["jobs"].values()
    (use,) = [step for step in job["steps"] if "lrrobust-check" in step.get("uses", "")]
    assert (ROOT / use["uses"]).resolve() == FOLDER
    assert use["with"].keys() <= load("action.yml")["inputs"].keys()
    (hook,) = load("example-pre-commit-config.yaml")["repos"][0]["hooks"]
    program, *arguments = shlex.split(hook["entry"])
    assert program == "lrrobust"
    done = CliRunner().invoke(cli.app, [*arguments, "--help"])
    assert done.exit_code == 0 and "baseline" in done.output
    readme = (FOLDER / "README.md").read_text()
    options = {word for line in readme.splitlines() for word in line.split() if word.startswith("--")}
    shown = CliRunner().invoke(cli.app, ["check", "--help"], env={"COLUMNS": "300"}).output
    shown += CliRunner().invoke(cli.app, ["eval", "--help"], env={"COLUMNS": "300"}).output
    assert options and all(option.rstrip("`,.") in shown for option in options)
