import json
import math
import os

import numpy as np
import pytest

from lrrobust.check.baseline import Measurement, Rule, build_baseline, read_baseline, write_baseline
from lrrobust.errors import BaselineError, ConfigError, LrRobustError, StoreError

ONE = 1 / 255


@pytest.fixture
def outcomes():
    generator = np.random.default_rng(0)
    return {
        ("pgd", "linf", ONE): generator.random(53) < 0.5,
        ("pgd", "linf", 2 * ONE): generator.random(53) < 0.3,
        ("cw", "l2", math.inf): np.zeros(53, bool),
    }


def test_survives_the_file_bit_by_bit(baseline_of, outcomes, tmp_path):
    baseline = baseline_of(outcomes)
    write_baseline(tmp_path / "b.json", baseline)
    again = read_baseline(tmp_path / "b.json")
    assert again == baseline
    (model,) = again.models
    assert {m.key for m in model.measurements} == outcomes.keys()
    for key, is_robust in outcomes.items():
        (found,) = [m for m in model.measurements if m.key == key]
        assert found.is_robust().tolist() == is_robust.tolist()
        assert found.robust_accuracy == is_robust.mean()
        assert len(found.robust) == 2 * 7  # 53 bits


def test_a_link_stays_one(tmp_path, baseline_of, outcomes):
    (tmp_path / "link.json").symlink_to("b.json")
    for outcome in (outcomes, outcomes):
        write_baseline(tmp_path / "link.json", baseline_of(outcome))
        assert (tmp_path / "link.json").is_symlink() and read_baseline(tmp_path / "b.json") == baseline_of(outcome)


def test_one_of_version_1_has_no_clean_accuracy(baseline_of, outcomes, tmp_path):
    write_baseline(tmp_path / "b.json", baseline_of(outcomes))
    document = json.loads((tmp_path / "b.json").read_text())
    assert (document["schema_version"], document["models"][0].pop("clean_accuracy")) == (2, 1.0)
    (tmp_path / "b.json").write_text(json.dumps({**document, "schema_version": 1}))
    assert read_baseline(tmp_path / "b.json").models[0].clean_accuracy is None


def test_a_changed_image_changes_two_lines(baseline_of, outcomes, tmp_path):
    for name in ("before", "after"):
        write_baseline(tmp_path / name, baseline_of(outcomes))
        is_robust = outcomes["pgd", "linf", ONE]
        is_robust[7] = not is_robust[7]
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("before", "after"))
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert [line.split('"')[1] for line, _ in changed] == ["robust_accuracy", "robust"]
    assert len("\n".join(before)) < 4000


def test_bits_stand_in_the_order_of_the_data_set():
    is_robust = np.array([True, False, False, False, False, False, False, True, True])
    assert Measurement.of("pgd", "linf", ONE, is_robust).robust == "8180"


def edit(document, *path):
    """The mapping that holds the last key of a path."""
    for part in path:
        document = document[part]
    return document


CORRUPTIONS = {
    "future version": lambda d: d.update(schema_version=3, news=1),
    "version as a text": lambda d: d.update(schema_version="1"),
    "unknown key": lambda d: d.update(extra=1),
    "missing rule": lambda d: d.pop("rule"),
    "significance of 0": lambda d: d["rule"].update(significance=0),
    "significance as a text": lambda d: d["rule"].update(significance="0.05"),
    "floor in points": lambda d: d["rule"].update(floor=5),
    "truth as a number": lambda d: d["rule"].update(weights_may_change=1),
    "edited settings": lambda d: d["protocol"]["attacks"][0].update(steps=1),
    "no data set": lambda d: d["protocol"].pop("dataset"),
    "another hash": lambda d: d.update(config_sha256="0" * 64),
    "no hash": lambda d: d.update(config_sha256="abc"),
    "no models": lambda d: d.update(models=[]),
    "no measurements": lambda d: d["models"][0].update(measurements=[]),
    "no weights hash": lambda d: d["models"][0]["model"].pop("state_sha256"),
    "short bitmap": lambda d: edit(d, "models", 0, "measurements", 0).update(robust="ff"),
    "odd bitmap": lambda d: edit(d, "models", 0, "measurements", 0).update(robust="f"),
    "foreign letters": lambda d: edit(d, "models", 0, "measurements", 0).update(robust="zz" * 7),
    "bits beyond the last image": lambda d: edit(d, "models", 0, "measurements", 0).update(
        robust="80" + "00" * 5 + "01", robust_accuracy=2 / 53
    ),
    "edited accuracy": lambda d: edit(d, "models", 0, "measurements", 0).update(robust_accuracy=0.99),
    "clean accuracy below robust ones": lambda d: edit(d, "models", 0).update(clean_accuracy=0.1),
    "other number of images": lambda d: edit(d, "models", 0, "measurements", 0).update(n=49),
    "huge n": lambda d: edit(d, "models", 0, "measurements", 0).update(n=10**15),
    "negative eps": lambda d: edit(d, "models", 0, "measurements", 0).update(eps=-1),
    "twice the same": lambda d: d["models"][0]["measurements"].append(d["models"][0]["measurements"][0]),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_what_was_tampered_with_is_refused_in_one_line(baseline_of, outcomes, tmp_path, corruption):
    path = tmp_path / "b.json"
    write_baseline(path, baseline_of(outcomes))
    document = json.loads(path.read_text())
    corruption(document)
    path.write_text(json.dumps(document))
    with pytest.raises(BaselineError) as caught:
        read_baseline(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b"<<<<<<< HEAD\n{}\n=======\n", b"[" * 100_000, b'{"schema_version": NaN}',
        b'{"schema_version": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_baseline_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(BaselineError) as caught:
        read_baseline(path)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(baseline_of, outcomes, tmp_path):
    """A review reads the one, JSON takes the other: all images broken, say, so that no fall is left to notice."""
    path = tmp_path / "b.json"
    write_baseline(path, baseline_of(outcomes))
    text = path.read_text()
    before, after = text.split('"robust": "', 1)
    bitmap, after = after.split('"', 1)
    hidden = f', "robust_accuracy": 0.0, "robust": "{"00" * 7}"'
    path.write_text(f'{before}"robust": "{bitmap}"{hidden}{after}')
    with pytest.raises(BaselineError, match="'robust.*stands twice") as caught:
        read_baseline(path)
    assert "\n" not in str(caught.value)


def test_one_request_may_hold_models_of_several_recipes(run_of, outcomes):
    models = ("a.py:build", "b.py:build")
    recipes = [{"recipe": "short 1"}, {"recipe": "long 2"}]
    runs = [run_of(outcomes, models=models, position=k, training=recipes[k]) for k in (0, 1)]
    assert "training" not in build_baseline(runs, Rule()).protocol


def test_every_truncation_is_refused(baseline_of, outcomes, tmp_path):
    path = tmp_path / "b.json"
    write_baseline(path, baseline_of(outcomes))
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(BaselineError):
            read_baseline(path)


def test_missing_folder_and_huge_files_are_said(tmp_path, monkeypatch):
    with pytest.raises(BaselineError, match="no baseline.*--update --run"):
        read_baseline(tmp_path / "none.json")
    with pytest.raises(BaselineError, match="cannot be read"):
        read_baseline(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BaselineError, match="cannot be read: not a regular file"):
        read_baseline(tmp_path / "pipe")
    monkeypatch.setattr("lrrobust.check.baseline.MAX_FILE_BYTES", 10)
    (tmp_path / "large").write_text(" " * 11)
    with pytest.raises(BaselineError, match="at most 10 bytes"):
        read_baseline(tmp_path / "large")


def test_rule_takes_what_is_given():
    rule = Rule(floor=0.02).replaced(significance=0.01)
    assert rule == Rule(significance=0.01, floor=0.02, weights_may_change=False)
    assert rule.replaced(weights_may_change=True).weights_may_change
    for wrong in ({"significance": 1.0}, {"significance": -0.1}, {"floor": 1.5}, {"floor": float("nan")}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
            rule.replaced(**wrong)
    with pytest.raises(ConfigError, match="--floor: expected .* points .*, found -1 points"):
        rule.replaced(floor=-0.01)


def test_runs_must_be_complete_and_of_one_command(run_of, outcomes):
    models = ("a.py:build", "b.py:build")
    first, second = (run_of(outcomes, models=models, position=position) for position in (0, 1))
    baseline = build_baseline([second, first], Rule())
    assert [model.name for model in baseline.models] == list(models)
    # Of some of its models it asks for these alone.
    part = build_baseline([second], Rule())
    assert [model.name for model in part.models] == part.request["models"] == ["b.py:build"]
    old = run_of(outcomes)
    del old.manifest["request"]
    emptied, replaced, elsewhere = (run_of(outcomes) for _ in range(3))
    emptied.manifest["request"], replaced.manifest["request"] = {}, None
    del elsewhere.manifest["position"]
    matrix = run_of(outcomes)
    matrix.manifest["request"]["surrogates"] = ["a", "b"]
    other_seed = run_of(outcomes, models=models, position=1, seed=9)
    for runs, error, message in (
        ([first, first], BaselineError, "evaluated 2 models"),
        ([first, run_of(outcomes)], BaselineError, "different `lrrobust eval` commands"),
        ([first, other_seed], BaselineError, "different images or attacks"),
        ([run_of(outcomes, is_complete=False)], StoreError, "not complete"),
        *(([unasked], StoreError, "older lrrobust") for unasked in (old, emptied, replaced, elsewhere)),
        ([matrix], BaselineError, "of one --surrogate at most"),
    ):
        with pytest.raises(error, match=message) as caught:
            build_baseline(runs, Rule())
        assert isinstance(caught.value, LrRobustError)
