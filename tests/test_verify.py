"""Transfer, 8 bits, export and reading back through the command line, on models where every outcome is known."""

import functools
import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lrrobust.export import _rows_sha256
from lrrobust.results import find_runs, load_run

#: The stranger's gradient has no part of the target's: what is made on it changes no logit of the target.
MODEL = """
import torch
from torch import nn
from lrrobust.models import Classifier

class Linear(nn.Module):
    def __init__(self, weight, classes):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.sign = 1 if classes[0] == "ant" else -1

    def forward(self, images):
        along = self.sign * ((images - 0.5).flatten(1) @ self.weight)
        return torch.stack([along, -along], 1)

def make(weight, classes=("ant", "bee")):
    return Classifier(Linear(weight.float(), classes), classes, input_size=8)

place = torch.arange(192)
ALONG, ACROSS = 1 - 2 * (place % 2), 1 - 2 * (place // 2 % 2)

def target(): return make(ALONG)
def twin(): return make(3 * ALONG, ("bee", "ant"))
def stranger(): return make(ACROSS)
def large():
    found = target()
    return Classifier(found.module, found.classes, input_size=16)
"""
LADDER = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model file and 20 images, none near the ends of the box; `distances` in grey levels, by key."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model.py").write_text(MODEL)
    generator, place = np.random.default_rng(0), np.arange(192)
    distances = {}
    for i in range(20):
        pixels = generator.integers(60, 196, (8, 8, 3), dtype=np.uint8)
        flat = pixels.transpose(2, 0, 1).reshape(-1) - 127.5
        along = (flat * (1 - 2 * (place % 2))).sum()
        # Half of the images go to a class that the target does not see in them.
        name = ("ant" if along > 0 else "bee") if i % 5 else ("bee" if along > 0 else "ant")
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
        distances[f"{name}/{i}.png"] = abs(along) / 192 if i % 5 else 0.0
    return folder, distances


@pytest.fixture
def run(run, workplace):
    return functools.partial(run, cwd=workplace[0])


def evaluate(run, out, *arguments):
    ladder = ",".join(f"{eps}/255" for eps in LADDER)
    code, _, err = run("eval", "--dataset", "images", "--attack", "fgsm", "--eps", ladder, "--out", out, *arguments)
    assert code == 0, err
    return {
        (found.manifest["model"]["name"], (found.manifest.get("surrogate") or {}).get("name")): found
        for found in map(load_run, find_runs(out))
    }


def broken_keys(found, steps):
    rows = found.rows[np.isclose(found.rows["eps"].to_numpy(float) * 255, steps)]
    return set(rows["key"][rows["is_broken"].astype(bool)])


def models(*names):
    return [argument for name in names for argument in ("--model", f"model.py:{name}")]


def test_transfer_breaks_what_the_gradients_have_in_common(run, workplace, tmp_path):
    _, distances = workplace
    runs = evaluate(
        run,
        tmp_path / "runs",
        *models("target"),
        "--surrogate",
        "model.py:twin",
        "--surrogate",
        "model.py:stranger",
        "--surrogate",
        "model.py:target",
    )
    wrong = {key for key, distance in distances.items() if distance == 0}
    names = {name: f"model.py:{name}" for name in ("target", "twin", "stranger")}
    assert set(runs) == {(names["target"], None), (names["target"], names["twin"]), (names["target"], names["stranger"])}
    counted = set()
    for steps in LADDER:
        reached = {key for key, distance in distances.items() if distance < steps}
        assert broken_keys(runs[names["target"], None], steps) == reached
        assert broken_keys(runs[names["target"], names["twin"]], steps) == reached
        assert broken_keys(runs[names["target"], names["stranger"]], steps) == wrong
        counted.add(len(reached - wrong))
    assert len(counted) > 2
    assert {len(found.folder.name.split("-from-")) for found in runs.values()} == {1, 2}

    code, out, err = run("report", tmp_path / "runs", "--out", tmp_path / "report")
    assert code == 0 and "model.py:twin" in out
    matrix = pd.read_csv(tmp_path / "report" / "transfer.csv")
    (stranger,) = matrix[(matrix.source == "model.py:stranger") & np.isclose(matrix.eps * 255, 4)].itertuples()
    assert stranger.robust_accuracy == stranger.clean_accuracy == 1 - len(wrong) / 20
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h3>Transfer</h3>" in page and "any of these" in page and "Transfer beats the white-box attacks nowhere" in page


def test_other_runs_know_nothing_of_transfer(run, tmp_path):
    (found,) = evaluate(run, tmp_path / "runs", *models("target")).values()
    assert "surrogate" not in found.manifest and "real_pixels" not in found.manifest
    code, _, _ = run("report", tmp_path / "runs", "--out", tmp_path / "report")
    assert code == 0 and not list((tmp_path / "report").glob("transfer*"))
    assert "<h3>Transfer</h3>" not in (tmp_path / "report" / "report.html").read_text()
    assert "8-bit" not in (tmp_path / "report" / "robust_accuracy.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--surrogate", "model.py:large"), "model.py:large takes images of 16 pixels, model.py:target of 8"),
        (("--surrogate", "model.py:twin", "--surrogate", "model.py:twin"), "--surrogate names the same model twice"),
        (("--surrogate", "model.py:twin", "--surrogate-weights", "a", "--surrogate-weights", "b"), "got 2 for 1 models"),
    ],
)
def test_what_does_not_fit_is_refused(run, tmp_path, arguments, pattern):
    code, _, err = run("eval", "--dataset", "images", *models("target"), "--out", tmp_path / "runs", *arguments)
    assert code == 2 and pattern in err and not (tmp_path / "runs").exists()


@pytest.fixture
def exported(run, tmp_path):
    (found,) = evaluate(run, tmp_path / "runs", *models("target"), "--save-adversarial").values()
    code, _, err = run("export", found.folder, "--out", tmp_path / "images")
    assert code == 0 and "wrote" in err
    return found, tmp_path / "images"


@pytest.fixture
def refused(run, exported):
    """refused(said, model): of the export as it is now, in one line."""

    def check(said, model="target"):
        code, _, err = run("verify", exported[1], *models(model))
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1

    return check


def test_images_of_two_runs_are_not_mixed(run, exported, tmp_path):
    found, folder = exported
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (other,) = evaluate(run, tmp_path / "others", *models("twin"), "--save-adversarial").values()
    code, _, err = run("export", other.folder, "--out", folder)
    assert code == 2 and "holds the images of another run" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # The same again, and over an index that is damaged.
    assert run("export", found.folder, "--out", folder)[0] == 0
    (folder / "index.parquet").write_bytes(b"damaged")
    assert run("export", found.folder, "--out", folder)[0] == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_exported_images_are_all_that_break_in_8_bits(run, workplace, exported):
    _, distances = workplace
    found, folder = exported
    index = pd.read_parquet(folder / "index.parquet")
    expected = {key for key, distance in distances.items() if 0 < distance < LADDER[-1]}
    assert set(index["key"]) == expected and len(expected) > 5
    for row in index.itertuples():
        # Whole grey levels, all of them one way: eps is the first of the ladder that suffices.
        assert round(255 * row.eps) == int(np.floor(distances[row.key])) + 1
        clean, adversarial = (np.asarray(Image.open(folder / name)).astype(int) for name in (row.clean_file, row.file))
        original = np.asarray(Image.open(workplace[0] / "images" / row.key)).astype(int)
        assert (clean == original).all() and set(np.unique(abs(adversarial - clean))) == {round(255 * row.eps)}
    code, out, _ = run("report", found.folder, "--out", folder.parent / "report")
    assert code == 0
    summary = pd.read_csv(folder.parent / "report" / "robust_accuracy.csv")
    for steps in LADDER:
        (row,) = summary[np.isclose(summary.eps * 255, steps)].itertuples()
        broken = sum(distance < steps for distance in distances.values())
        assert row.robust_accuracy_quantized == pytest.approx(1 - broken / 20) == row.robust_accuracy


def test_read_back_they_fool_the_model_and_no_stranger(run, exported):
    _, folder = exported
    n = len(pd.read_parquet(folder / "index.parquet"))
    code, out, err = run("verify", folder, *models("target"))
    assert code == 0 and out.split().count(f"{n}") == 5 and "not the model" not in err
    code, out, err = run("verify", folder, *models("stranger"))
    assert code == 0 and "not the model" in err and "0" in out.split()
    # A model with its classes in another order: labels follow the names.
    code, out, _ = run("verify", folder, *models("twin"))
    assert code == 0 and out.split().count(f"{n}") >= 4


def test_the_model_is_the_same_under_another_name(run, workplace, exported):
    _, folder = exported
    (folder.parent / "renamed.py").write_text((workplace[0] / "model.py").read_text())
    index = pd.read_parquet(folder / "index.parquet")
    rewrite(folder, file=index.clean_file[0], sha256=index.clean_sha256[0])
    code, _, err = run("verify", folder, "--model", folder.parent / "renamed.py:target")
    assert code == 1 and "not the model" not in err


def rewrite(folder, is_resealed=True, about=(), **first_row):
    """Replaces values of the index' first row, and of what it says of all of them."""
    table = pq.read_table(folder / "index.parquet")
    for name, value in first_row.items():
        place = table.schema.get_field_index(name)
        column = pa.array([value, *table[name].to_pylist()[1:]])
        table = table.set_column(place, table.schema.field(place), column)
    known = json.loads(table.schema.metadata[b"lrrobust"]) | dict(about)
    if is_resealed:
        known["rows_sha256"] = _rows_sha256(table.to_pylist())
    table = table.replace_schema_metadata({b"lrrobust": json.dumps(known).encode()})
    pq.write_table(table, folder / "index.parquet")


def test_an_image_that_fools_no_more_is_exit_code_1(run, exported):
    _, folder = exported
    index = pd.read_parquet(folder / "index.parquet")
    # The clean image in the place of an adversarial one, with its own hash.
    rewrite(folder, file=index.clean_file[0], sha256=index.clean_sha256[0])
    code, out, _ = run("verify", folder, *models("target"))
    assert code == 1 and f"{len(index) - 1}" in out.split()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, image: image.write_bytes(image.read_bytes()[:-9]), "is not the file that the index describes"),
        (lambda folder, image: (folder / "index.parquet").write_bytes(b"PAR1"), "is not the index of an export"),
        (lambda folder, image: image.unlink(), "cannot be read"),
        (lambda folder, image: rewrite(folder, file="../model.py"), "lies outside"),
    ],
    ids=["image", "index", "missing", "outside"],
)
def test_damage_is_said_in_one_line(refused, exported, damage, said):
    _, folder = exported
    damage(folder, next((folder / "adversarial" / "fgsm").iterdir()))
    refused(said)


def test_a_model_for_images_of_another_size_is_refused(refused):
    refused("has 8 x 8 pixels, the model takes 16 x 16", "large")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("place", ["image", "index"])
def test_nobody_waits_for_a_pipe_in_the_place_of_a_file(refused, exported, place):
    _, folder = exported
    file = folder / "index.parquet" if place == "index" else next((folder / "adversarial" / "fgsm").iterdir())
    file.unlink()
    os.mkfifo(file)
    refused("not a regular file")


def test_a_table_that_is_no_index_is_said_to_be(refused, exported):
    _, folder = exported
    pd.read_parquet(folder / "index.parquet").to_parquet(folder / "index.parquet")
    refused("it does not say of which run it is")


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 1.0, "is_resealed": False},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"norm": "l3"},
        {"file": "a\0.png"},
        {"about": {"model": []}},
        {"about": {"is_complete": 1}},
    ],
    ids=str,
)
def test_an_index_that_was_edited_is_refused_in_one_line(refused, exported, change):
    rewrite(exported[1], **change)
    refused("is not the index of an export")


def test_images_so_far_are_said_to_be_that_and_none_is_no_proof(run, exported):
    found, folder = exported
    for part in found.folder.glob("parts/*.parquet"):
        part.unlink()
    for images in found.folder.glob("adversarial/*"):
        images.unlink()
    code, _, err = run("export", found.folder, "--out", folder.parent / "none")
    assert code == 0 and "the run is not finished, or lost some of its images" in err
    code, _, err = run("verify", folder.parent / "none", *models("target"))
    assert code == 0 and "there was no image to judge" in err


@pytest.mark.parametrize("is_damaged", [False, True])
def test_images_that_were_lost_are_said_to_be_and_the_same_command_brings_them_back(run, tmp_path, caplog, is_damaged):
    evaluate(run, tmp_path / "runs", *models("target"), "--save-adversarial", "--chunk-size", "5")
    (found,) = map(load_run, find_runs(tmp_path / "runs"))
    first, *_ = sorted(found.folder.glob("adversarial/*.parquet"))
    content = first.read_bytes()
    if is_damaged:
        first.write_bytes(content[:-5])
    else:
        first.unlink()
    code, _, err = run("export", found.folder, "--out", tmp_path / "images")
    assert code == 0 and "its images are left out" in caplog.text and "lost some of its images" in err
    evaluate(run, tmp_path / "runs", *models("target"), "--save-adversarial", "--chunk-size", "5")
    assert first.read_bytes() == content
    caplog.clear()
    code, _, err = run("export", found.folder, "--out", tmp_path / "images")
    assert code == 0 and not caplog.text and "lost some" not in err


def test_runs_without_images_are_refused(run, tmp_path):
    (found,) = evaluate(run, tmp_path / "runs", *models("target"), "--quantize").values()
    code, _, err = run("export", found.folder, "--out", tmp_path / "images")
    assert code == 2 and "evaluate again with --save-adversarial" in err
    code, _, err = run("verify", tmp_path / "images", *models("target"))
    assert code == 2 and "run `lrrobust export` first" in err
