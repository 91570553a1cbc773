"""`lrrobust crosscheck` as a user meets it, with the one library that always comes along."""

import functools

import pandas as pd
import pytest

from lrrobust.results import find_runs, load_run

MODEL = """
import torch
from torch import nn
from lrrobust.models import Classifier

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.weight.t()

def build():
    return Classifier(Small(), ("ant", "bee", "cat"), input_size=8)
"""


@pytest.fixture
def call(run, tmp_path, draw_classes):
    (tmp_path / "model.py").write_text(MODEL)
    draw_classes(tmp_path / "images", 6)
    return functools.partial(run, "crosscheck", "--model", "model.py:build", "--dataset", "images", cwd=tmp_path)


def test_a_table_a_file_and_an_ordinary_run(call, tmp_path):
    code, out, err = call("--attack", "pgd", "--n", "12", "--peer", "torchattacks")
    assert code == 0, err
    (folder,) = find_runs(tmp_path / "reports" / "runs")
    rows = load_run(folder).rows
    table = pd.read_csv(tmp_path / "reports" / "crosscheck" / f"{folder.name}.csv")
    assert table["peer"].tolist() == 6 * ["torchattacks"] and set(table["n"]) == {12}
    assert table["robust_accuracy"].tolist() == pytest.approx((1 - rows.groupby("eps")["is_broken"].mean()).tolist())
    # Of a linear model both find all there is to find; ours keeps what it saw on the way besides.
    assert (table["peer_robust_accuracy"] >= table["robust_accuracy"]).all() and (table["only_ours"] <= 1).all()
    assert 0 < table["robust_accuracy"].iloc[0] and not table["only_peer"].any()
    assert "0.125/255" in out and "torchattacks" in out and f"{100 * table['robust_accuracy'].iloc[0]:.1f}" in out
    assert f"wrote reports/crosscheck/{folder.name}.csv" in err


def test_peers_attack_at_chosen_budgets_alone(call, tmp_path):
    code, _, err = call("--n", "6", "--peer", "torchattacks", "--peer-eps", "1/255, 4/255")
    assert code == 0, err
    (folder,) = find_runs(tmp_path / "reports" / "runs")
    assert load_run(folder).rows["eps"].nunique() == 6
    table = pd.read_csv(tmp_path / "reports" / "crosscheck" / f"{folder.name}.csv")
    assert table["eps"].tolist() == pytest.approx([1 / 255, 4 / 255])


@pytest.mark.parametrize(
    ("peer_eps", "message"),
    [
        ("1/255,3/255", "expected budgets that our attacks have, 0.125/255 (0.000490196), "),
        ("one", 'error: one: expected a number or a fraction such as "8/255"'),
    ],
)
def test_budgets_that_ours_lack_are_refused_before_anything_runs(call, tmp_path, peer_eps, message):
    code, _, err = call("--n", "6", "--peer", "torchattacks", "--peer-eps", peer_eps)
    assert code == 2 and message in err
    assert not list(tmp_path.glob("reports/runs/*/parts/*"))


def test_what_is_missing_is_said_in_one_line(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("--peer", "foolbox")
    assert code == 2 and "error: there is nothing to compare with: foolbox is not installed: pip install foolbox" in err
    code, _, err = call("--peer", "fool-box")
    assert code == 2 and "unknown library 'fool-box': did you mean foolbox?" in err
