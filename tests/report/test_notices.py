from dataclasses import replace

from lrrobust.report.notices import mixed_metadata, warnings_of, warnings_with_rejections


def test_says_what_the_engine_noticed(make_run):
    run = make_run(metadata=({"device": "cpu", "randomised": "yes: robustness is overstated"},))
    said = (
        "the model's logits are random: images stand or break by chance, and attacks may overstate its robustness unless they "
        "average over enough passes (--eot-iter; here %d)"
    )
    assert warnings_of(run) == [said % 1]
    attacks = [{**spec, "eot_iter": 4} for spec in run.manifest["attacks"]]
    averaging = replace(run, manifest={**run.manifest, "attacks": attacks})
    assert warnings_of(averaging) == [said % 4]
    assert warnings_of(make_run()) == []


def test_says_which_attacks_proposed_nothing_that_counts(make_run):
    run = make_run()
    assert warnings_with_rejections(run) == []
    rows = run.rows.copy()
    rows["outcome"] = rows["outcome"].astype(str)
    rows.loc[(rows["attack"] == "pgd") & (rows["outcome"] == "robust"), "outcome"] = "rejected"
    count = rows[rows["outcome"] == "rejected"]["index"].nunique()
    said = [f"for {count} images pgd last proposed something outside of ball or box: they count as robust, and may not be"]
    assert count > 1 and warnings_with_rejections(replace(run, rows=rows)) == said
    assert warnings_of(replace(run, rows=rows)) == []


def test_says_in_what_parts_differ(make_run):
    run = make_run(planned=2, metadata=({"device": "cpu", "threads": "1"}, {"device": "cuda", "threads": "1"}))
    assert mixed_metadata(run) == {"device": ["cpu", "cuda"]} and mixed_metadata(make_run()) == {}
