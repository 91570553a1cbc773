import math
import os
from pathlib import Path

import pytest
import yaml

from lrrobust.attacks import suite as suite_module
from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import RESERVED_NAME, PgdSpec
from lrrobust.attacks.suite import AttackListing, list_attacks, load_suite, read_settings
from lrrobust.config_file import MAX_FILE_BYTES
from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.report.naming import WORST_CASE

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "attacks_configs").glob("*.yaml"))
LINF = tuple(grey / 255 for grey in (0.125, 0.25, 0.5, 1, 2, 4))
LADDERS = {"linf": LINF, "l2": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0), "l1": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)}
PGD = "kind: pgd\nnorm: linf\neps: [1/255]\nsteps: 5\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_shipped_configuration_loads_and_builds():
    assert sorted(line.name for line in list_attacks()) == SHIPPED
    assert {"cw", "fgsm", "pgd", "quick", "standard", "strong"} <= set(SHIPPED)
    for name in SHIPPED:
        for spec in load_suite([name]):
            # All on one ladder, so that attacks can be compared and their worst case taken.
            assert set(spec.eps) <= set(LADDERS[spec.norm])
            assert spec.name not in ("fgsm", "pgd", "pgd_l2", "pgd_l1", "cw") or spec.eps == LADDERS[spec.norm]
            assert spec.description
            assert Attack(spec).ladder == ((math.inf,) if spec.minimises else spec.eps)


@pytest.mark.parametrize(("suite", "end"), [("strong", ""), ("strong_l2", "_l2")])
def test_the_strong_suites_are_the_recipe_of_autoattack(suite, end):
    ce, targeted, fab, square = specs = load_suite([suite])
    assert [spec.name for spec in specs] == [f"{name}{end}" for name in ("apgd_ce", "apgd_t", "fab_t", "square")]
    assert all(spec.survivors_only and spec.eps == ce.eps and spec.norm == ce.norm for spec in specs)
    assert (ce.loss, ce.steps, targeted.loss, targeted.targets, targeted.steps) == ("ce", 100, "targeted_dlr", 9, 100)
    assert (fab.targets, fab.steps, fab.overshoot, fab.largest_pull, fab.backward_share) == (9, 100, 1.05, 0.1, 0.9)
    assert (square.queries, square.p_init, square.rescale_schedule) == (5000, 0.8, False)


def test_strong_l1_has_the_starts_and_targets_of_autoattack():
    ce, targeted, fmn = specs = load_suite(["strong_l1"])
    assert fmn.name == "fmn_l1" and all(spec.survivors_only and spec.norm == "l1" for spec in specs)
    assert (ce.steps, ce.restarts, targeted.steps, targeted.targets) == (100, 5, 100, 5)


def test_the_listing_shows_attacks_first_and_suites_with_their_norms():
    listing = list_attacks()
    assert AttackListing("cw", "cw", "l2", "minimal l2 change, 5 x 100 Adam steps") in listing
    assert "standard" in [line.name for line in listing if line[1:3] == ("suite", "linf, l2")]
    order = [(line.kind == "suite", line.name) for line in listing]
    assert order == sorted(order) and {is_suite for is_suite, _ in order} == {False, True}


def test_the_installed_folder_is_used_when_there_is_one(tmp_path, monkeypatch):
    """A wheel carries the configurations inside the package."""
    configs = tmp_path / "lrrobust" / "attacks_configs"
    configs.mkdir(parents=True)
    (configs / "only.yaml").write_text(PGD)
    monkeypatch.setattr(suite_module, "__file__", str(tmp_path / "lrrobust" / "attacks" / "suite.py"))
    suite_module._shipped.cache_clear()
    try:
        assert [line.name for line in list_attacks()] == ["only"]
        configs.rename(tmp_path / "elsewhere")
        suite_module._shipped.cache_clear()
        with pytest.raises(ConfigError, match="attacks_configs: .*install"):
            list_attacks()
    finally:
        suite_module._shipped.cache_clear()


def test_order_is_kept_and_repeated_attacks_come_once():
    names = [spec.name for spec in load_suite(["pgd_l2", "standard", "pgd"])]
    assert names == ["pgd_l2", "fgsm", "pgd", "cw", "fmn", "fmn_l2"]


def test_files_are_named_by_stem_and_suites_find_them_beside_themselves(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.yaml").write_text(PGD)
    (folder / "sub" / "inner.yml").write_text("kind: suite\nattacks: [mine.yaml]\n")
    (folder / "outer.yaml").write_text("kind: suite\nattacks: [fgsm, sub/inner.yml, ./sub/mine.yaml]\n")
    for given in ("outer.yaml", Path("outer.yaml"), folder / "outer.yaml"):
        fgsm, mine = load_suite([given])
        assert (fgsm.name, mine.name, mine.eps, type(mine)) == ("fgsm", "mine", (1 / 255,), PgdSpec)
    # A path object is a file even if a shipped attack has its name.
    with pytest.raises(ConfigError, match="pgd: expected a YAML file"):
        load_suite([Path("pgd")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected keys and values.* found an empty file"),
        ("# nothing\n", "found an empty file"),
        ("[1, 2]", r"expected keys and values.* found \[1, 2\]"),
        ("just words", "found 'just words'"),
        ("kind: pgd\n  steps: 3", "expected YAML, found mapping values are not allowed here .line 2, column 8"),
        ("kind: [pgd", "expected YAML, found .*line 1"),
        ("---\nkind: pgd\n---\nkind: fgsm\n", "expected YAML, found another document"),
        ("kind: \x07", "expected YAML, found"),
        ("when: 2024-02-31", "expected YAML, found"),
        ("kind: " + "[" * 5000, "expected YAML, found"),
        ("kind: !!python/object/apply:os.system [ls]", "expected YAML, found could not determine a constructor"),
        (PGD + "restarts: 010", "010, which is no plain decimal number.* .line 5, column 11"),
        (PGD + "restarts: 1:30", "1:30, which is no plain decimal number"),
        (PGD + "step_size_ratio: 1:30.5", "1:30.5, which is no plain decimal number"),
        (PGD + "restarts: 0x10", "0x10, which is no plain decimal number"),
        ("a: &x [1]\nb: *x\n", "anchors and aliases are not allowed .line 1, column 4"),
        ("kind: pgd\n<<: {steps: 5}", "keys must be plain words .line 2"),
        ("kind: pgd\n1: 5", "keys must be plain words"),
        ("kind: pgd\nkind: fgsm", "key 'kind' is repeated .line 2, column 1"),
        ("eps: [1/255]", "kind: expected one of fgsm, pgd, .*suite, found no such key"),
        ("kind: deep", "kind: expected one of fgsm, pgd, .*suite, found 'deep'"),
        ("kind: [pgd]", "kind: expected one of"),
        (PGD + "name: other", "name: unexpected key"),
        (PGD + "step_size: 1", "step_size: unknown key, did you mean step_size_ratio"),
        (PGD + "pgd: 1", "pgd: unknown key, expected one of description, eot_iter, eps"),
        (PGD + "step_size_ratio: 0", "step_size_ratio: expected more than 0, found 0"),
        (PGD + "restarts: 1000000000000", "restarts: expected at most 1000000, found 1000000000000"),
        (PGD + "random_start: 1", "random_start: expected true or false, found 1"),
        (PGD + "restarts: 2024-01-01", "expected text, numbers, true, false and lists"),
        (PGD + "restarts: .nan", "restarts: expected a whole number, found nan"),
        ("kind: pgd\nnorm: linf\neps: [1/255]", "expected also steps, found only kind, norm, eps"),
        ("kind: fgsm\neps: 1/255", "eps: expected a list, as in \\[a, b\\], found '1/255'"),
        ("kind: fgsm\neps: [1/255, x]", "eps.1: expected a number or a fraction such as \"8/255\", found 'x'"),
        ("kind: fgsm\neps: [.nan]", "eps.0: expected a finite number, found nan"),
        ("kind: fgsm\neps: [8]", "eps: expected budgets of at most 1.* largest is 8"),
        ("kind: suite\nattacks: []", "attacks: expected a longer list, found"),
        ("kind: suite\nattacks: pgd", "attacks: expected a list, as in \\[a, b\\], found 'pgd'"),
        ("kind: suite\nattacks: [pgd]\nsuite: 1", "suite: unknown key"),
        ("kind: suite\nattacks: [pgdd]", "attacks: unknown attack or suite 'pgdd': did you mean pgd"),
        ("kind: suite\nattacks: [no.yaml]", "no.yaml: expected a YAML file, found no such file"),
        ('kind: suite\nattacks: ["a\\0.yaml"]', "expected the path of a YAML file"),
        ("kind: suite\nattacks: [bad.yaml]", "attacks: a suite cannot include itself .bad.yaml -> bad.yaml"),
        ("kind: suite\nattacks: [fgsm, ring.yaml]", "attacks: a suite cannot include itself .bad.yaml -> ring.yaml -> bad"),
    ],
)
def test_mistakes_are_told_in_one_line_with_file_and_key(folder, content, message):
    (folder / "bad.yaml").write_text(content)
    (folder / "ring.yaml").write_text("kind: suite\nattacks: [pgd, bad.yaml]\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_suite(["bad.yaml"])
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    assert "bad.yaml" in text or "no.yaml" in text


def test_unreadable_files_are_told(folder):
    (folder / "latin.yaml").write_bytes(b"kind: pgd # \xe9")
    (folder / "big.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (folder / "full.yaml").write_bytes(PGD.encode().ljust(MAX_FILE_BYTES, b"\n"))
    (folder / "dir.yaml").mkdir()
    with pytest.raises(ConfigError, match="latin.yaml: expected UTF-8 text, found byte 0xe9 at 12"):
        load_suite(["latin.yaml"])
    with pytest.raises(ConfigError, match="big.yaml: expected at most 65536 bytes"):
        load_suite(["big.yaml"])
    with pytest.raises(ConfigError, match="dir.yaml: expected a YAML file, found a folder"):
        load_suite(["dir.yaml"])
    os.mkfifo(folder / "pipe.yaml")
    with pytest.raises(ConfigError, match="pipe.yaml: expected a YAML file, found a pipe or a device"):
        load_suite(["pipe.yaml"])
    (folder / "half.yaml").write_text(PGD + 'description: "a \\ud800"\n')
    with pytest.raises(ConfigError, match=r"half.yaml: .* found 'a \\ud800', which has half a character in it \(line 5"):
        load_suite(["half.yaml"])
    with pytest.raises(ConfigError, match="name, for a file its stem, of at most 64 lower-case"):
        (folder / "My PGD.yaml").write_text(PGD)
        load_suite(["My PGD.yaml"])
    assert len(load_suite(["full.yaml"])) == 1


def test_a_suite_for_survivors_marks_its_attacks(folder):
    (folder / "mine.yaml").write_text(PGD)
    (folder / "strict.yaml").write_text("kind: suite\nsurvivors_only: true\nattacks: [fgsm, mine.yaml]\n")
    assert [spec.survivors_only for spec in load_suite(["strict.yaml"])] == [True, True]
    # What was asked for before the suite stays whole.
    assert [spec.survivors_only for spec in load_suite(["fgsm", "strict.yaml", "cw"])] == [False, True, False]


def test_a_suite_nested_many_times_is_read_once(folder):
    """Doubling at every level, read naively, takes 2 ** 30 reads."""
    (folder / "s0.yaml").write_text("kind: suite\nattacks: [pgd]\n")
    for level in range(1, 30):
        (folder / f"s{level}.yaml").write_text(f"kind: suite\nattacks: [s{level - 1}.yaml, ./s{level - 1}.yaml]\n")
    assert [spec.name for spec in load_suite(["s29.yaml"])] == ["pgd"]


def test_names_must_be_known_and_differ(folder):
    with pytest.raises(UnknownNameError, match="unknown attack or suite 'standart': did you mean standard"):
        load_suite(["standart"])
    with pytest.raises(ConfigError, match="no attack given; shipped: .*cw, .*fgsm"):
        load_suite([])
    (folder / "pgd.yaml").write_text(PGD)
    with pytest.raises(ConfigError, match="an attack called 'pgd' was already given"):
        load_suite(["pgd", "pgd.yaml"])


def test_no_attack_is_called_as_rows_of_reports_are(folder):
    assert RESERVED_NAME == WORST_CASE
    (folder / f"{WORST_CASE}.yaml").write_text(PGD)
    with pytest.raises(ConfigError, match="worst_case.yaml: name: expected another name"):
        load_suite([f"{WORST_CASE}.yaml"])


def test_exponents_are_numbers(folder):
    (folder / "mine.yaml").write_text(PGD.replace("eps: [1/255]", "eps: [1e-3, 2.5e-2, +1E-1]"))
    assert load_suite(["mine.yaml"])[0].eps == (1e-3, 2.5e-2, 0.1)


def test_attacks_without_a_setting_keep_theirs_and_this_is_said(caplog):
    fgsm, pgd = load_suite(["quick"], steps=3)
    assert (fgsm, pgd.steps) == (load_suite(["fgsm"])[0], 3)
    assert "steps: left as it is in what has no such setting: fgsm" in caplog.text
    caplog.clear()
    assert [spec.eps for spec in load_suite(["quick"], eps=["1/255"])] == [(1 / 255,), (1 / 255,)]
    assert not caplog.records


def test_overrides_replace_and_are_checked():
    (pgd,) = load_suite(["pgd"])
    (changed,) = load_suite(["pgd"], eps=["1/255", 0.5], steps=7, restarts=3)
    assert (changed.eps, changed.steps, changed.restarts) == ((1 / 255, 0.5), 7, 3)
    assert changed.model_copy(update={"eps": pgd.eps, "steps": 20, "restarts": 1}) == pgd
    assert load_suite(["pgd", "pgd_l2"], steps=7)[1].steps == 7
    (fgsm, _) = load_suite(["quick"], eps=("1/255",))
    assert fgsm.eps == (1 / 255,)

    with pytest.raises(ConfigError, match="fgsm, cw: no 'restarts' to replace"):
        load_suite(["fgsm", "cw"], restarts=3)
    with pytest.raises(ConfigError, match="fgsm: no 'steps' to replace"):
        load_suite(["fgsm"], steps=3)
    with pytest.raises(ConfigError, match="pgd: steps: expected at least 1, found 0"):
        load_suite(["pgd"], steps=0)
    with pytest.raises(ConfigError, match="pgd: eps.0: expected a number or a fraction .* found '4/'"):
        load_suite(["pgd"], eps=["4/"])
    with pytest.raises(ConfigError, match="pgd: eps: expected budgets in ascending order"):
        load_suite(["pgd"], eps=[0.5, 0.25])
    with pytest.raises(ConfigError, match="pgd: eps"):
        load_suite(["pgd"], eps=[])
    with pytest.raises(ConfigError, match="several norms.*pgd: linf, pgd_l2: l2"):
        load_suite(["standard"], eps=[0.5])


@pytest.mark.parametrize("name", SHIPPED)
def test_settings_shown_are_the_settings(name, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(read_settings(name)))
    assert load_suite([path]) == load_suite([name]) and "name" not in read_settings(path)


def test_averaging_over_passes_changes_no_identity_where_it_is_not_asked_for():
    for name in SHIPPED:
        assert all("eot_iter" not in spec.model_dump(mode="json") for spec in load_suite([name]))
    averaged = load_suite(["standard"], eot_iter=20)
    assert {spec.model_dump(mode="json")["eot_iter"] for spec in averaged} == {20}
    assert read_settings("pgd")["steps"] == 20 and read_settings("pgd")["eot_iter"] == 1
    with pytest.raises(ConfigError, match="eot_iter"):
        load_suite(["pgd"], eot_iter=0)


def test_averaging_is_a_key_of_files(folder):
    path = folder / "mine.yaml"
    path.write_text(PGD + "eot_iter: 5\n")
    assert load_suite([path])[0].eot_iter == read_settings(path)["eot_iter"] == 5
