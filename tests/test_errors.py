from lrrobust.errors import UnknownNameError


def test_unknown_names_are_answered_with_the_nearest_else_with_what_there_is():
    assert str(UnknownNameError("attack", "pdg", ["fgsm", "pgd"])) == "unknown attack 'pdg': did you mean pgd?"
    assert str(UnknownNameError("attack", "?", ["pgd", "fgsm"])) == "unknown attack '?': known: fgsm, pgd"


def test_long_lists_are_cut():
    text = str(UnknownNameError("timm model", "?", [f"model{place:04d}" for place in range(1000)]))
    assert text.endswith("model0099, and 900 more") and len(text) < 1500
