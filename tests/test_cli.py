"""The command line as a user meets it: real processes, real folders, a small model of the user's own."""

import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from own_process import environment, run_process
from PIL import Image

from lrrobust import cli
from lrrobust.exits import StandardOutput
from lrrobust.plots import label_runs
from lrrobust.report.summary import summarise
from lrrobust.results import find_runs, load_run

MODEL = """
import torch
from torch import nn
from lrrobust.models import Classifier

CLASSES = ("ant", "bee", "cat")

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.05 * torch.randn(3, 3 * 16 * 16, generator=generator))

    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.weight.t()

def build():
    return Classifier(Small(), CLASSES, input_size=16)

class Nan(Small):
    def forward(self, images):
        return super().forward(images) * float("nan")

def build_other():
    other = Small()
    other.weight.data.mul_(-1)
    return Classifier(other, CLASSES, input_size=16)

def build_nan():
    return Classifier(Nan(), CLASSES, input_size=16)

def build_wrong_shape():
    return Classifier(Small(), ("ant", "bee"), input_size=16)

def build_number():
    return 7

def build_failing():
    raise KeyError("weights")
"""


LRROBUST = (sys.executable, "-m", "lrrobust")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, draw_classes):
    """A folder with a model file and 24 images of three classes."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model.py").write_text(MODEL)
    draw_classes(folder / "images", 8, side=16)
    return folder


@pytest.fixture
def run(run, workplace):
    return functools.partial(run, cwd=workplace)


EVAL = ("eval", "--model", "model.py:build", "--dataset", "images")


def assert_one_line(code, err, pattern):
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert re.search(pattern, lines[0]), lines[0]


def test_eval_prints_the_table_and_keeps_the_rows(run, tmp_path):
    code, out, err = run(*EVAL, "--attack", "pgd", "--n", 10, "--out", tmp_path / "runs")
    assert code == 0, err
    assert "0.125/255" in out
    assert "4/255" in out
    (folder,) = find_runs(tmp_path / "runs")
    loaded = load_run(folder)
    assert loaded.is_complete
    assert len(loaded.rows) == 10 * 6
    assert loaded.manifest["dataset"]["n"] == 10
    shown = float(re.search(r"4/255\s+10\s+[\d.]+\s+([\d.]+)", out).group(1))
    at_largest = loaded.rows[loaded.rows.eps == 4 / 255]
    assert shown == pytest.approx(100 * (1 - at_largest.is_broken.mean()), abs=0.05)


def test_budgets_are_repeated_or_stand_behind_commas(run, tmp_path):
    budgets = ("--eps", "1/255", "--eps", "2/255, 4/255")
    code, _, err = run(*EVAL, "--attack", "fgsm", *budgets, "--n", 6, "--out", tmp_path, "--no-diagnostics")
    assert code == 0, err
    assert set(load_run(find_runs(tmp_path)[0]).rows.eps) == {1 / 255, 2 / 255, 4 / 255}


def test_a_factory_that_draws_anew_each_time_is_told_so(run, workplace, tmp_path):
    code = (workplace / "model.py").read_text().replace(".manual_seed(0)", "; generator.seed()")
    (tmp_path / "drawn.py").write_text(code)
    arguments = ("eval", "--model", tmp_path / "drawn.py:build", "--dataset", "images", "--attack", "fgsm", "--n", 6)
    errors = [run(*arguments, "--out", tmp_path / "runs", "--no-diagnostics")[2] for _ in range(2)]
    assert "a new run begins" not in errors[0] and "if the factory draws parameters, seed it" in errors[1]
    assert len(find_runs(tmp_path / "runs")) == 2
    # So is one whose code changed while it was evaluated.
    (tmp_path / "drawn.py").write_text(f"{code}\n# changed")
    assert "as code or parameters of the model are not" in run(*arguments, "--out", tmp_path / "runs", "--no-diagnostics")[2]
    # Another attack is another run for a reason of its own.
    assert run(*EVAL, "--attack", "fgsm", "--n", 6, "--out", tmp_path / "own", "--no-diagnostics")[0] == 0
    err = run(*EVAL, "--attack", "pgd", "--n", 6, "--out", tmp_path / "own", "--no-diagnostics")[2]
    assert "a new run begins" not in err


def test_two_claims_of_one_name_are_refused(run, tmp_path):
    claims = [tmp_path / folder / "mine.yaml" for folder in "ab"]
    for claim in claims:
        claim.parent.mkdir()
        claim.write_text(CLAIM)
    code, _, err = run("report", tmp_path, "--claim", claims[0], "--claim", claims[1])
    assert_one_line(code, err, "two claims are called mine")


def test_without_docstrings_commands_work(workplace):
    done = run_process(sys.executable, "-OO", "-m", "lrrobust", "attacks", cwd=workplace)
    assert done.returncode == 0 and "pgd" in done.stdout


@pytest.mark.parametrize("command", [[], ["check"]])
def test_help_that_nobody_reads_to_its_end_is_no_failure(command, workplace):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*LRROBUST, *command, "--help"], cwd=workplace, env=environment(), **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)


def test_several_models_see_the_same_images_and_report_draws_them(run, tmp_path):
    code, _, err = run(*EVAL, "--model", "model.py:build_other", "--suite", "standard", "--n", 4, "--out", tmp_path / "runs")
    assert code == 0, err
    runs = [load_run(folder) for folder in find_runs(tmp_path / "runs")]
    assert len(runs) == 2
    assert runs[0].manifest["dataset"] == runs[1].manifest["dataset"]
    code, out, err = run("report", tmp_path / "runs", "--out", tmp_path / "summary")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "summary" / "robust_accuracy.csv")
    assert set(table.attack) == {"fgsm", "pgd", "pgd_l2", "cw", "fmn", "fmn_l2", "worst_case"}
    assert ((table.robust_accuracy >= 0) & (table.robust_accuracy <= table.clean_accuracy)).all()
    suffixes = {path.suffix for path in (tmp_path / "summary").iterdir()}
    assert suffixes == {".html", ".csv", ".md", ".tex", ".png", ".svg", ".pdf", ".json"}
    # The shipped claim is about other models, and nobody asked for it; who does is told.
    assert "not judged" not in err
    assert json.loads((tmp_path / "summary" / "claim.json").read_text()).items() >= {"results": [], "not_judged": []}.items()
    code, _, err = run("report", tmp_path / "runs", "--claim", "lrnet_more_robust", "--out", tmp_path / "asked")
    assert (
        code == 2
        and "claim lrnet_more_robust not judged: No run of lr_resnet50 or resnet50 is among those given, which are of" in err
    )
    assert "error: no verdict on lrnet_more_robust" in err and (tmp_path / "asked" / "report.html").exists()


CLAIM = """
statement: This network is more robust than the other.
source: nobody
treatment: model.py:build
control: model.py:build_other
direction: more_robust
significance: 0.05
power: 0.8
smallest_difference: 0.02
largest_clean_difference: 0.02
"""


def test_report_judges_claims_and_says_the_verdict_first(run, tmp_path):
    (tmp_path / "mine.yaml").write_text(CLAIM)
    code, _, err = run(*EVAL, "--model", "model.py:build_other", "--attack", "fgsm", "--out", tmp_path / "runs")
    assert code == 0, err
    arguments = ("report", tmp_path / "runs", "--claim", tmp_path / "mine.yaml", "--out", tmp_path / "summary")
    code, out, err = run(*arguments)
    assert code == 0, err
    # 24 images cannot decide anything.
    assert out.splitlines()[0] == "INCONCLUSIVE: This network is more robust than the other."
    assert out.index("Smallest difference that would be shown") < out.index("median")
    assert f"wrote {tmp_path / 'summary' / 'claim.json'}" in err.replace("\n", "")
    (result,) = json.loads((tmp_path / "summary" / "claim.json").read_text())["results"]
    assert result["verdict"] == "inconclusive" and result["claim"]["name"] == "mine"
    assert all(f"* {reason}" in out for reason in result["reasons"])
    table = pd.read_csv(tmp_path / "summary" / "robust_accuracy.csv").set_index(["model", "eps"])["robust_accuracy"]
    for row in result["comparisons"]:
        if row["population"] == "all":
            assert row["treatment_accuracy"] == table["model.py:build", row["eps"]]
            assert row["control_accuracy"] == table["model.py:build_other", row["eps"]]


def test_files_of_one_name_are_told_apart(run, workplace, tmp_path):
    other = MODEL.replace("manual_seed(0)", "manual_seed(1)")
    for folder, text in (("mine", MODEL), ("theirs", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.py").write_text(text)
    options = ("--dataset", workplace / "images", "--attack", "fgsm", "--no-diagnostics", "--out", tmp_path / "runs")
    code, out, err = run("eval", "--model", "mine/model.py:build", "--model", "theirs/model.py:build", *options, cwd=tmp_path)
    assert code == 0, err
    assert "mine/model.py:build" in out and "theirs/model.py:build" in out
    summary = summarise([load_run(folder) for folder in find_runs(tmp_path / "runs")])
    accuracy = summary.drop_duplicates("model").set_index("model")["clean_accuracy"]
    assert set(label_runs(summary).values()) == set(accuracy.index) == {"mine/model.py:build", "theirs/model.py:build"}
    code, _, err = run("eval", "--model", "theirs/model.py:build", *options[:-1], tmp_path / "alone", cwd=tmp_path)
    assert code == 0, err
    alone = summarise([load_run(folder) for folder in find_runs(tmp_path / "alone")])
    assert set(alone.model) == {"model.py:build"}
    assert alone.clean_accuracy.iloc[0] == accuracy["theirs/model.py:build"] != accuracy["mine/model.py:build"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_ctrl_c_before_a_command_has_begun(run, tmp_path, monkeypatch, error):
    def interrupt(*_, **__):
        raise error

    monkeypatch.setattr(cli, "app", interrupt)
    assert run("models", cwd=tmp_path) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("eval", "--model", "lr_resnet5"), "unknown model 'lr_resnet5'.*lr_resnet50"),
        (("eval", "--model", "lr_resnet101"), "no weights of lr_resnet101.*--weights"),
        (("eval", "--model", "missing.py:build"), "no file missing.py"),
        (("eval", "--model", "model.py:bild", "--dataset", "images"), "no function 'bild'"),
        (("eval", "--model", "model.py:build_number", "--dataset", "images"), "returned int.*Classifier"),
        (("eval", "--model", "model.py:build_failing", "--dataset", "images"), "model.py, line \\d+ failed with KeyError"),
        (("eval", "--model", "model.py:build_nan", "--dataset", "images", "--attack", "fgsm"), "NaN or infinite logits"),
        (
            ("eval", "--model", "model.py:build_wrong_shape", "--dataset", "images", "--attack", "fgsm"),
            r"expected logits of shape \(4, 2\)",
        ),
        ((*EVAL, "--attack", "pdg"), "'pdg'.*pgd"),
        (
            (*EVAL, "--attack", "typo"),
            "unknown attack or suite 'typo': a file is given with its ending .yaml or .yml, found typo.yaml",
        ),
        (("eval", "--model", "lr.safetensors"), "unknown model 'lr.safetensors': weights are given with --weights"),
        ((*EVAL, "--n", 0), "'--n': expected greater than or equal to 1"),
        (("eval", "--model", "resnet50", "--weights", "V9"), "unknown weights of resnet50.*'V9'.*DEFAULT"),
        ((*EVAL, "--attack", "typo.yaml"), "stepps: unknown key, did you mean steps"),
        (("eval", "--model", "model.py"), "model.py names no function: add the factory, as in model.py:build"),
        ((*EVAL, "--attack", "broken.yaml"), "broken.yaml"),
        ((*EVAL, "--attack", "pgd", "--eps", "8/0"), "eps"),
        ((*EVAL, "--attack", "pgd", "--n", 100), "100.*24"),
        ((*EVAL, "--dataset", "nowhere"), "nowhere"),
        ((*EVAL, "--dataset", "damaged"), "bee/0.png.*--skip-corrupt"),
        ((*EVAL, "--device", "tpu0"), "--device 'tpu0'"),
        ((*EVAL, "--weights", "a", "--weights", "b"), "--weights must be given once for each"),
        ((*EVAL, "--weights", "model.py"), "model.py is neither a safetensors"),
        ((*EVAL, "--indices", "indices.txt"), "indices.txt"),
        ((*EVAL, "--attack", "fgsm", "--steps", 3), "fgsm: no 'steps' to replace"),
        ((*EVAL, "--weights", "none"), "brings its own weights"),
        (("eval",), r"Missing option '--model'.*\(see `lrrobust eval --help`\)"),
        ((*EVAL, "--n", "many"), "Invalid value for '--n'.*see `lrrobust eval --help`"),
        ((*EVAL, "--stps", 3), "No such option: --stps.*--steps"),
        ((*EVAL, "extra"), "unexpected extra argument.*extra"),
        (("evl", "--model", "x"), "No such command 'evl'"),
        (("report", "empty"), "no runs in empty"),
        (("report", "empty", "--claim", "no_such"), "unknown claim 'no_such': known: lrnet_more_robust"),
        (("train", "--model", "resnet26", "--data", "images", "--recipe", "no_such"), "unknown recipe 'no_such'"),
        (("bench", "store", "--threads", 2**63), "--threads.*1024"),
        ((*EVAL, "--dataset", "caf\udce9"), r"'caf\\udce9': expected text in .*rename"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, workplace, tmp_path, arguments, pattern):
    (workplace / "broken.yaml").write_text("kind: pgd\nnorm: linf\neps: [1/255]\nsteps: many\n")
    (workplace / "typo.yaml").write_text("kind: pgd\nnorm: linf\neps: [1/255]\nstepps: 5\n")
    (workplace / "indices.txt").write_text("1\ntwo\n")
    (workplace / "empty").mkdir(exist_ok=True)
    for name in ("ant", "bee"):
        (workplace / "damaged" / name).mkdir(parents=True, exist_ok=True)
        good = (workplace / "images" / name / "0.png").read_bytes()
        (workplace / "damaged" / name / "0.png").write_bytes(good if name == "ant" else good[: len(good) // 2])
    options = ("--out", tmp_path / "out")
    code, _, err = run(*arguments, *options)
    assert_one_line(code, err, pattern)


def test_an_output_whose_encoding_lacks_a_sign_shows_its_number():
    written = io.BytesIO()
    output = StandardOutput(io.TextIOWrapper(written, encoding="cp437"))  # of consoles on Windows
    output.write("fab_t† 1 é")
    output.flush()
    assert written.getvalue().decode("cp437") == r"fab_t\u2020 1 é"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_nobody_can_take_loses_nothing(workplace, tmp_path):
    command = (*LRROBUST, *EVAL, "--attack", "fgsm", "--out", tmp_path / "runs")
    cases = [
        ('"$@" > /dev/full', 2, "error: the system refused standard output (No space left on device)"),
        ('"$@" >&-', 0, "results: "),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 141, "going on with "),
    ]
    for shell, code, said in cases:
        done = run_process("bash", "-c", shell, "-", *command, cwd=workplace)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        (folder,) = find_runs(tmp_path / "runs")
        assert load_run(folder).is_complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("shell", ['"$@" 2> /dev/full', '"$@" 2> >(true)'])
def test_progress_that_nobody_can_take_decides_nothing(workplace, tmp_path, shell):
    command = (*LRROBUST, *EVAL, "--attack", "fgsm", "--out", tmp_path / "runs")
    done = run_process("bash", "-c", shell, "-", *command, cwd=workplace)
    assert done.returncode == 0 and "fgsm" in done.stdout and load_run(find_runs(tmp_path / "runs")[0]).is_complete


def test_what_cameras_wrote_wrongly_beside_the_pixels_is_nobodys_business(workplace, tmp_path):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    cut = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"  # five entries promised, none there
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "ant" / "0.jpg", exif=cut)
    command = ("eval", "--model", workplace / "model.py:build", "--dataset", "images", "--attack", "fgsm", "--out", "runs")
    done = run_process(*LRROBUST, *command, cwd=tmp_path)
    assert done.returncode == 0 and "EXIF" not in done.stderr


def test_a_model_that_closes_its_output_closes_nobody_elses(workplace, tmp_path):
    closing = "\nimport sys\n\ndef closing():\n    sys.stdout.close()\n    sys.stderr.close()\n    return build()\n"
    (tmp_path / "closing.py").write_text((workplace / "model.py").read_text() + closing)
    command = ("eval", "--model", tmp_path / "closing.py:closing", "--dataset", "images", "--attack", "fgsm")
    done = run_process(*LRROBUST, *command, "--out", tmp_path / "runs", cwd=workplace)
    assert done.returncode == 0 and "fgsm" in done.stdout and "results: " in done.stderr


def test_a_defect_shows_where_and_is_no_failed_check(run, monkeypatch):
    def fail(*_):
        raise ValueError("a defect")

    monkeypatch.setattr("lrrobust.console.listings.print_models", fail)
    code, _, err = run("models")
    assert code == 70 and "Traceback" in err and "ValueError: a defect" in err and "please report it" in err


@pytest.mark.parametrize("library", ["torch", "pandas"])
def test_a_library_that_cannot_be_loaded_is_no_failed_check(workplace, library):
    (workplace / "broken").mkdir(exist_ok=True)
    (workplace / "broken" / f"{library}.py").write_text("raise ImportError('failed to map\\nsegment')")
    search = os.pathsep.join([str(workplace / "broken"), str(Path(cli.__file__).parents[1])])
    done = run_process(*LRROBUST, "eval", "--model", "resnet26", env=environment(PYTHONPATH=search))
    (workplace / "broken" / f"{library}.py").unlink()
    assert_one_line(done.returncode, done.stderr, r"could not be loaded \(failed to map segment\).*requirements")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_loses_nothing(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        arguments = (*EVAL, "--attack", "fgsm", "--chunk-size", 2, "--out", disk)
        code, _, err = run(*arguments)
        assert_one_line(code, err, "no room|No space")
        kept = len(list(disk.glob("*/parts/*.parquet")))
        assert 0 < kept < 12
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        code, _, err = run(*arguments)
        assert code == 0, err
        (folder,) = find_runs(disk)
        assert load_run(folder).is_complete
    finally:
        subprocess.run(["umount", disk], check=True)


def test_listings_name_what_there_is(run, tmp_path):
    code, out, err = run("models", cwd=tmp_path)
    assert code == 0, err
    assert "lr_resnet50" in out
    assert "23.4" in out
    code, out, err = run("attacks", cwd=tmp_path)
    assert code == 0, err
    assert all(name in out for name in ("fgsm", "pgd", "pgd_l2", "cw", "standard"))


def test_settings_are_printed_as_a_file_of_ones_own(run, tmp_path):
    code, out, err = run("attacks", "pgd", cwd=tmp_path)
    assert code == 0, err
    assert "\nloss: ce\n" in out and "eps: [0.125/255, 0.25/255, " in out
    (tmp_path / "mine.yaml").write_text(out)
    assert run("attacks", "mine.yaml", cwd=tmp_path)[:2] == (0, out)
    code, out, err = run("attacks", "pdg", cwd=tmp_path)
    assert (code, out) == (2, "") and "error: unknown attack or suite 'pdg': did you mean pgd?" in err


def test_version_and_help_answer(run, tmp_path):
    from lrrobust import __version__

    assert run("--version", cwd=tmp_path)[:2] == (0, f"lrrobust {__version__}\n")
    code, out, _ = run("--help", cwd=tmp_path)
    assert code == 0
    assert all(command in out for command in ("eval", "report", "train", "models", "attacks"))
    assert "..." not in out.partition("Commands:")[2], "what a command does is cut short in the list"


def test_no_command_at_all_gets_the_list(run, tmp_path):
    code, out, err = run(cwd=tmp_path)
    assert code == 2
    assert all(command in out + err for command in ("eval", "report", "train", "models", "attacks"))


def test_an_accuracy_of_guesses_is_doubted_aloud(run, tmp_path):
    options = ("--attack", "fgsm", "--no-diagnostics", "--out", tmp_path / "runs")
    code, _, err = run(*EVAL, *options)
    assert code == 0, err
    correct = round(24 * load_run(find_runs(tmp_path / "runs")[0]).rows["is_clean_correct"].mean())
    # Random images, random weights.
    assert f"{correct} of 24 images are correct when clean, as guessing among 3 classes might be" in err
    perfect = tmp_path / "perfect"
    for name, level in (("ant", 0), ("bee", 1), ("cat", 2)):
        (perfect / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.zeros((16, 16, 3), np.uint8)
            pixels[..., level] = 200 + i
            Image.fromarray(pixels).save(perfect / name / f"{i}.png")
    (tmp_path / "colour.py").write_text(
        "import torch\nfrom lrrobust.models import Classifier\n"
        "def build():\n    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
        "    return Classifier(pool, ('ant', 'bee', 'cat'), input_size=16)\n"
    )
    code, out, err = run("eval", "--model", tmp_path / "colour.py:build", "--dataset", perfect, *options, cwd=tmp_path)
    assert code == 0, err
    assert "100.0" in out and "guessing" not in err
