import pytest
import yaml

from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.verdict.claims import CLAIMS_FOLDER, DEFAULT_CLAIM, load_claim
from lrrobust.verdict.records import Claim

CONTENT = yaml.safe_load((CLAIMS_FOLDER / f"{DEFAULT_CLAIM}.yaml").read_text(encoding="utf-8"))


def write(folder, **changes):
    path = folder / "mine.yaml"
    content = {key: value for key, value in (CONTENT | changes).items() if value != "absent"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CLAIMS_FOLDER.iterdir()), ids=lambda path: path.stem)
def test_shipped_claims_are_read(path):
    claim = load_claim(path.stem)
    assert claim.name == path.stem and claim == load_claim(path)
    assert Claim.model_validate_json(claim.model_dump_json()) == claim


def test_the_default_is_about_the_shipped_pair():
    claim = load_claim(DEFAULT_CLAIM)
    assert (claim.treatment, claim.control, claim.direction) == ("lr_resnet50", "resnet50", "more_robust")
    assert claim.attacks is claim.eps is claim.dataset is None


def test_a_file_may_narrow_the_evidence(tmp_path):
    claim = load_claim(write(tmp_path, attacks=["pgd"], eps={"linf": ["1/255", 0.4]}, dataset="photos"))
    assert claim.name == "mine" and claim.attacks == ("pgd",) and claim.dataset == "photos"
    assert claim.eps == {"linf": (1 / 255, 0.4)}


def test_what_a_file_does_not_say_is_as_in_the_shipped_claim(tmp_path):
    settings = ("significance", "power", "smallest_difference", "largest_clean_difference")
    claim = load_claim(write(tmp_path, **dict.fromkeys(settings, "absent")))
    assert {key: getattr(claim, key) for key in settings} == {key: CONTENT[key] for key in settings}


def test_a_file_may_name_a_draw_of_images(tmp_path):
    subset = load_claim(write(tmp_path, subset={"n": 500, "seed": 3})).subset
    assert (subset.n, subset.seed, subset.balanced, subset.sha256, str(subset)) == (500, 3, None, None, "n = 500, seed = 3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": {}}, "subset: expected n, seed, balanced or sha256, found none"),
        ({"subset": {"n": 0}}, "subset.n: expected at least 1, found 0"),
        ({"subset": {"size": 3}}, "subset.size: unknown key, expected one of balanced, n, seed, sha256"),
        ({"subset": {"sha256": "ab"}}, "subset.sha256: "),
        ({"tretment": "x"}, "mine.yaml: tretment: unknown key, did you mean treatment?"),
        ({"source": "absent", "control": "absent"}, "mine.yaml: expected also source, control, found only "),
        ({"name": "other"}, "mine.yaml: name: unexpected key"),
        ({"direction": "better"}, "direction: .*more_robust"),
        ({"significance": "0.05"}, "significance: expected a number"),
        ({"significance": 0}, "significance: expected more than 0"),
        ({"power": 1.0}, "power: .*less than 1"),
        ({"smallest_difference": -0.1}, "smallest_difference: expected more than 0"),
        ({"attacks": []}, "attacks: expected a longer list"),
        ({"eps": {"l7": [0.1]}}, "eps.l7.*'linf', 'l2' or 'l1'"),
        ({"eps": {"linf": [0.2, 0.1]}}, "eps.linf: .*ascending"),
        ({"eps": {"l2": [0, 0.1]}}, "budgets above 0"),
        ({"eps": {"linf": ["1/255", 0.5]}}, "budgets below linf 1/2, from which no model can be robust"),
        ({"control": "lr_resnet50"}, "another model than the treatment"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_claim(write(tmp_path, **changes))


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown claim 'lrnet_more_robst': did you mean lrnet_more_robust?"):
        load_claim("lrnet_more_robst")
