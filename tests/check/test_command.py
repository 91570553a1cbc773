"""`lrrobust check` as a user meets it, on a real model, real files and real runs."""

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from own_process import environment
from PIL import Image

from lrrobust import cli
from lrrobust.check.baseline import read_baseline
from lrrobust.check.compare import CheckResult
from lrrobust.results import find_runs

GATE = Path(__file__).parent / "gate"
_SPEC = importlib.util.spec_from_file_location("gate_model", GATE / "model.py")
gate_model = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gate_model)


def draw_images(folder, n):
    """Prototypes under noise, as BMP: the same bytes on every machine."""
    generator = np.random.default_rng(7)
    prototypes = gate_model.prototypes()
    for index in range(n):
        which = index % len(gate_model.CLASSES)
        pixels = np.clip(prototypes[which] + generator.integers(-150, 151, prototypes[which].shape), 0, 255).astype(np.uint8)
        path = folder / gate_model.CLASSES[which] / f"{index:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def make_workplace(folder, n):
    shutil.copy(GATE / "model.py", folder / "model.py")
    draw_images(folder / "images", n)


EVAL = (
    "eval", "--model", "model.py:build", "--dataset", "images", "--attack", "pgd", "--eps", "1/255,4/255,12/255", "--steps", 5,
)  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, 200 images, their run and its baseline."""
    folder = tmp_path_factory.mktemp("work")
    make_workplace(folder, 200)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert cli.run([str(a) for a in (*EVAL, "--out", "runs")]) == 0
        (kept,) = find_runs(Path("runs"))
        assert cli.run(["check", "b.json", "--update", "--run", str(kept)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def own(workplace, tmp_path):
    """A copy of the workplace to change."""
    shutil.copytree(workplace, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def check(run, own):
    """check(*options) -> (exit code, standard output, standard error), against the baseline there."""
    return functools.partial(run, "check", "b.json", cwd=own)


def replace_in(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def one_error(err):
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def test_the_projects_own_gate(run, tmp_path):
    """This project's CI checks its own attacks and judge with its own gate.

    When it fails with code 2 because the evaluation was changed on purpose, rewrite the baseline and review what changed:
    draw the images (`draw_images`) beside gate/model.py and run `lrrobust check baseline.json --update` there.
    """
    make_workplace(tmp_path, 50)
    started = time.monotonic()
    code, out, err = run("check", GATE / "baseline.json", "--format", "json", cwd=tmp_path)
    assert code == 0, out + err
    result = CheckResult.model_validate_json(out)
    assert result.verdict == "passed"
    # An attack that has lost its strength is as wrong here, and passes a gate that is for models.
    assert max(len(c.gained) for c in result.comparisons) <= 3
    assert time.monotonic() - started < 180
    accuracies = [m.robust_accuracy for m in read_baseline(GATE / "baseline.json").models[0].measurements]
    assert len(accuracies) == 39 and max(accuracies) > 0.9 and min(accuracies) < 0.1


def test_an_honest_rerun_passes_every_time(run, workplace):
    for _ in range(3):
        code, out, err = run("check", "b.json", cwd=workplace)
        assert code == 0, err
        assert ", 0 flips" in out.splitlines()[-1] and out.splitlines()[-1].startswith("PASSED")
    assert {path.name for path in workplace.iterdir()} == {"model.py", "images", "runs", "b.json"}


DAZZLED = """class Dazzled(nn.Sequential):
    def forward(self, images):
        logits = super().forward(images)
        is_bright = images.mean((1, 2, 3)) > BRIGHT
        return torch.where(is_bright[:, None], -logits, logits)


def build():"""


def test_a_loss_of_5_points_is_caught(check, own):
    """A model that is dazzled by the brightest images: a real run of it, compared with the real run before."""
    robust = next(m for m in read_baseline(own / "b.json").models[0].measurements if m.eps == 1 / 255).is_robust()
    brightness = {path: np.asarray(Image.open(path)).mean() / 255 for path in sorted((own / "images").rglob("*.bmp"))}
    bright = [path for path, _ in sorted(brightness.items(), key=lambda item: -item[1])]
    of_robust = [path for path in bright if robust[list(brightness).index(path)]]
    planted, spared = of_robust[:10], of_robust[10]
    limit = (brightness[planted[-1]] + brightness[spared]) / 2
    replace_in(own / "model.py", "nn.Sequential(nn.Flatten()", "Dazzled(nn.Flatten()")
    replace_in(own / "model.py", "def build():", f"BRIGHT = {limit!r}\n\n\n{DAZZLED}")

    code, out, err = check("--weights-may-change", "--format", "json")
    assert code == 1, err
    result = CheckResult.model_validate_json(out)
    at_smallest = result.comparisons[0]
    assert at_smallest.is_regression
    assert at_smallest.fall == pytest.approx(0.05, abs=0.011)
    assert {flip.key for flip in at_smallest.lost} >= {f"{path.parent.name}/{path.name}" for path in planted}

    code, out, _ = check("--weights-may-change", "--floor", 50)
    assert code == 0 and "floor 50 points" in out


def test_another_model_is_refused_unless_it_is_what_is_tested(check, own):
    replace_in(own / "model.py", "copy_(grey / 255)", "copy_(1.01 * grey / 255)")
    code, out, err = check()
    assert code == 2
    assert "weights and code of model.py:build changed" in one_error(err) and "--weights-may-change" in one_error(err)
    assert not out
    # Kept in the baseline, the rule needs no option any more.
    (kept,) = find_runs(own / "runs")
    assert check("--update", "--run", kept, "--weights-may-change", "--floor", 2)[0] == 0
    rule = read_baseline(own / "b.json").rule
    assert rule.weights_may_change and rule.floor == 0.02
    code, out, err = check()
    assert code == 0, err
    assert "note: weights and code of model.py:build changed" in out
    code, _, err = check("--weights-must-match")
    assert code == 2 and "changed" in one_error(err)


def test_other_images_and_settings_are_refused_and_named(check, own):
    image = own / "images" / "east" / "000.bmp"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    code, out, err = check("--format", "junit", "--weights-may-change")
    assert code == 2
    assert "dataset.sha256: " in one_error(err)
    assert ElementTree.fromstring(out).get("errors") == "1"
    # The request of the baseline is what is done again: other settings are other baselines.
    document = json.loads((own / "b.json").read_text())
    document["request"]["steps"] = 7
    (own / "b.json").write_text(json.dumps(document))
    code, _, err = check()
    assert code == 2
    assert "attacks.0.steps: 5 in the baseline, 7 now" in one_error(err)


def test_differences_are_found_before_the_long_work(check, own, monkeypatch):
    monkeypatch.setattr("lrrobust.planned_evaluation.Evaluation.run", lambda *_: pytest.fail("computed"))
    replace_in(own / "model.py", "copy_(grey / 255)", "copy_(1.01 * grey / 255)")
    assert check()[0] == 2


def test_update_rewrites_on_purpose(check, own):
    replace_in(own / "model.py", "copy_(grey / 255)", "copy_(0.99 * grey / 255)")
    before = read_baseline(own / "b.json")
    code, _, err = check("--update")
    assert code == 0, err
    assert "new in the baseline: weights and code of model.py:build changed" in err
    assert "wrote b.json" in err
    now = read_baseline(own / "b.json")
    assert now.models[0].model["state_sha256"] != before.models[0].model["state_sha256"]
    assert now.request == before.request and now.rule == before.rule
    assert check()[0] == 0


@pytest.mark.parametrize(
    ("images", "warning"), [(3, "a check against few.json could never fail"), (7, "few.json is not sure to notice a fall")]
)
def test_update_warns_once_of_a_gate_that_may_notice_nothing(run, check, own, caplog, images, warning):
    keep = own / "few.txt"
    keep.write_text("".join(f"{place}\n" for place in range(images)))
    options = ("--indices", keep, "--no-diagnostics", "--out", "few")
    assert run(*EVAL, *options, cwd=own)[0] == 0
    caplog.clear()
    code, _, err = run("check", "few.json", "--update", "--run", find_runs(own / "few")[0], cwd=own)
    assert code == 0 and "wrote few.json" in err and "sure to notice" not in err
    (said,) = caplog.messages
    assert warning in said
    assert "a check is sure to notice a fall of" in check("--update")[2]


def test_one_model_of_several_makes_a_baseline(run, own):
    shutil.copy(own / "model.py", own / "other.py")
    options = ("--model", "other.py:build", "--no-diagnostics", "--out", "both")
    assert run(*EVAL, *options, cwd=own)[0] == 0
    (other,) = [folder for folder in find_runs(own / "both") if folder.name.startswith("other")]
    code, _, err = run("check", "other.json", "--update", "--run", other, cwd=own)
    assert code == 0, err
    assert read_baseline(own / "other.json").request["models"] == ["other.py:build"]
    assert run("check", "other.json", cwd=own)[0] == 0
    # Twice the same is none of one request.
    code, _, err = run("check", "twice.json", "--update", "--run", other, "--run", other, cwd=own)
    assert code == 2 and "give the run of each once" in one_error(err)


def test_a_damaged_baseline_is_made_anew_from_a_run_alone(check, own, caplog):
    good = (own / "b.json").read_bytes()
    (own / "b.json").write_bytes(good[:100])
    assert check("--update")[0] == 2
    code, _, err = check("--update", "--run", find_runs(own / "runs")[0])
    assert code == 0, err
    assert "made anew" in caplog.text and "kept as b.json.old" in caplog.text
    assert (own / "b.json").read_bytes() == good and (own / "b.json.old").read_bytes() == good[:100]
    # A file of another kind, named by mistake, is not lost either.
    (own / "b.json").write_text("my notes")
    assert check("--update", "--run", find_runs(own / "runs")[0])[0] == 0
    assert (own / "b.json.old2").read_text() == "my notes"


def test_moved_models_and_images_are_found_again(run, workplace, tmp_path):
    shutil.copytree(workplace / "images", tmp_path / "images")
    (tmp_path / "src").mkdir()
    shutil.copy(workplace / "model.py", tmp_path / "src" / "model.py")
    arguments = ("check", workplace / "b.json", "--model", "src/model.py:build", "--dataset", tmp_path / "images")
    code, _, err = run(*arguments, "--out", tmp_path / "kept", cwd=tmp_path)
    assert code == 0, err
    (kept,) = find_runs(tmp_path / "kept")
    code, out, err = run("check", workplace / "b.json", "--run", kept, cwd=tmp_path)
    assert code == 0, err
    assert "PASSED" in out


def test_a_finished_run_of_an_earlier_check_does_not_pass_for_a_fresh_one(check, own):
    """It looks at no model again, and a model may have changed in code that its file imports."""
    replace_in(own / "model.py", "from torch import nn", "from torch import nn\n\nfrom pathlib import Path")
    assert check("--weights-may-change", "--out", "kept")[0] == 0
    code, _, err = check("--weights-may-change", "--out", "kept")
    assert code == 2
    assert "from an earlier check" in one_error(err) and f"--run {find_runs(Path('kept'))[0]}" in one_error(err)


def test_a_check_that_could_never_fail_is_refused(check, own, caplog):
    kept = find_runs(own / "runs")[0]
    assert check("--run", kept, "--floor", 99.9)[0] == 2
    good = (own / "b.json").read_bytes()
    code, _, err = check("--update", "--run", kept, "--floor", 99.9)
    assert code == 0, err
    # What it took the place of could fail.
    assert "could never fail" in caplog.text and "the one before is kept as b.json.old" in caplog.text
    assert (own / "b.json.old").read_bytes() == good
    code, _, err = check()
    assert code == 2 and "could never fail" in one_error(err)


def test_a_name_begins_no_line_of_an_error(check):
    code, _, err = check("--model", "x\n::error::y.py:build")
    assert code == 2
    assert "no file x ::error::y.py" in one_error(err) and not any(line.startswith("::") for line in err.splitlines())


def test_a_baseline_without_models_is_said(check, own):
    document = json.loads((own / "b.json").read_text())
    document["request"]["models"] = []
    (own / "b.json").write_text(json.dumps(document))
    code, _, err = check()
    assert code == 2 and "no model" in one_error(err)


def test_every_format_at_once(check, own):
    summary = own / "summary.md"
    formats = ("text", "github", "json=r.json", "junit=r.xml", "markdown=r.md")
    asked = [word for each in formats for word in ("--format", each)]
    os.environ["GITHUB_STEP_SUMMARY"] = str(summary)
    try:
        code, out, err = check("--run", find_runs(own / "runs")[0], *asked)
    finally:
        os.environ.pop("GITHUB_STEP_SUMMARY", None)
    assert code == 0, err
    result = CheckResult.model_validate_json((own / "r.json").read_text())
    assert result.verdict == "passed" and len(result.comparisons) == 3
    assert ElementTree.parse(own / "r.xml").getroot().get("tests") == "3"
    assert (own / "r.md").read_text().startswith("### Robustness: passed")
    assert out.splitlines()[-1].startswith("::notice title=Robustness::")


def test_github_is_noticed(run, own, monkeypatch):
    arguments = ("check", "b.json", "--run", find_runs(own / "runs")[0])
    assert "::notice" not in run(*arguments, cwd=own)[1]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(own / "summary.md"))
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.chdir(own)
    assert cli.run([str(a) for a in arguments]) == 0
    assert (own / "summary.md").read_text().startswith("### Robustness: passed")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("none.json",), "no baseline none.json.*--update"),
        (("model.py",), "baseline model.py: .*restore"),
        (("b.json", "--run", "runs"), "no manifest.json|expected a run"),
        (("b.json", "--run", "nowhere"), "expected a run in nowhere"),
        (("b.json", "--run", "runs", "--model", "x"), "--run compares a run that is there|expected a run"),
        (("b.json", "--format", "xml"), "--format must be one of"),
        (("b.json", "--significance", "2"), "--significance.*found 2"),
        (("b.json", "--floor", "-1"), "--floor"),
        (("b.json", "--model", "nowhere.py:build"), "no file nowhere.py"),
        (("b.json", "--model", "model.py:build", "--model", "model.py:build"), "same model twice"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, workplace, arguments, pattern):
    code, _, err = run("check", *arguments, cwd=workplace)
    assert code == 2
    assert re.search(pattern, one_error(err))


def test_ctrl_c(workplace, tmp_path):
    """Interrupted while it evaluates: says so, leaves nothing behind."""
    shutil.copytree(workplace / "images", tmp_path / "images")
    model = (workplace / "model.py").read_text()
    slow = model.replace(
        "def build():",
        "class Slow(nn.Flatten):\n    def forward(self, images):\n        import time\n"
        "        time.sleep(0.05)\n        return super().forward(images)\n\n\ndef build():",
    )
    (tmp_path / "model.py").write_text(slow.replace("nn.Sequential(nn.Flatten()", "nn.Sequential(Slow()"))
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "lrrobust", "check", workplace / "b.json", "--weights-may-change"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(tmp_path / "tmp")),
    )
    while process.poll() is None and not list((tmp_path / "tmp").glob("lrrobust-check-*/*/parts/*.parquet")):
        time.sleep(0.02)
    (private,) = (tmp_path / "tmp").glob("lrrobust-check-*")
    assert private.stat().st_mode & 0o777 == 0o700
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: nothing was compared or kept" in err and "Traceback" not in err
    assert out == ""
    assert not list((tmp_path / "tmp").glob("lrrobust-check-*"))
