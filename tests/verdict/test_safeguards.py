from found_safeguards import failed, named


def test_sound_evidence_passes_and_says_what_was_not_looked_into(check):
    safeguards = check()
    assert not failed(safeguards)
    assert {guard.name for guard in safeguards if guard.passed is None} == {"transfer"}
    linf, l2 = named(safeguards, "unbounded_attack")[:2]
    assert linf.detail.endswith(
        "is without a budget, but diagnostics tried one that holds plain grey: 0 of 32 images withstand pgd."
    )
    assert "Without a budget, 0 of 4 images of A withstand cw" in l2.detail
    assert all(guard.detail.endswith(".") for guard in safeguards)
