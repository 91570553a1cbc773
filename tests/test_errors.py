from lrrobust.errors import UnknownNameError


def test_unknown_names_are_answered_with_the_nearest_else_with_what_there_is():
    assert str(UnknownNameError("attack", "pdg", ["fgsm", "pgd"])) == "unknown attack 'pdg': did you mean pgd?"
    assert str(UnknownNameError("attack", "?", ["pgd", "fgsm"])) == "unknown attack '?': known: fgsm, pgd"
    near = UnknownNameError("attack", "pdg", ["fgsm", "pgd"], "a YAML file")
    assert str(near) == "unknown attack 'pdg': did you mean pgd? or give a YAML file"
    assert str(UnknownNameError("attack", "?", ["pgd"], "a YAML file")) == "unknown attack '?': known: pgd; or give a YAML file"


def test_long_lists_are_cut():
    text = str(UnknownNameError("timm model", "?", [f"model{place:04d}" for place in range(1000)]))
    assert text.endswith("model0039, and 960 more") and len(text) < 1500
