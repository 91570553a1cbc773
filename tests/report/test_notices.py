from lrrobust.report.notices import mixed_metadata, warnings_of


def test_says_what_the_engine_noticed(make_run):
    run = make_run(metadata=({"device": "cpu", "randomised": "yes: robustness is overstated"},))
    assert warnings_of(run) == ["the model's logits are random: robustness is overstated"]
    assert warnings_of(make_run()) == []


def test_says_in_what_parts_differ(make_run):
    run = make_run(planned=2, metadata=({"device": "cpu", "threads": "1"}, {"device": "cuda", "threads": "1"}))
    assert mixed_metadata(run) == {"device": ["cpu", "cuda"]} and mixed_metadata(make_run()) == {}
