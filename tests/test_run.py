import dataclasses
import json

import pytest
import torch

from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.errors import ConfigError, DataError
from lrrobust.run import EvaluationRequest, prepare_evaluations


def test_each_model_is_judged_on_each_surrogate(request_for, tmp_path):
    request = dataclasses.replace(request_for("build", "build_other_classes"), surrogates=(f"{tmp_path}/model.py:build",))
    white, transfer = prepare_evaluations(request, ["test"])
    assert white.surrogate is None and "surrogate" not in white.manifest
    assert transfer.manifest["surrogate"] == white.manifest["model"]
    assert [evaluation.manifest["position"] for evaluation in (white, transfer)] == [0, 1]
    attacked = transfer._surrogate()
    assert [transfer.surrogate.classes[label] for label in attacked.labels] == list(transfer.images.wnids)
    assert attacked.labels != list(transfer.images.labels)


def test_models_that_write_accents_in_their_own_ways_share_classes(request_for, tmp_path):
    (tmp_path / "images" / "bee").rename(tmp_path / "images" / "be\u0301e")
    for target, surrogate in (("build_accents", "build_two_characters"), ("build_two_characters", "build_accents")):
        (transfer,) = prepare_evaluations(request_for(target, surrogates=(f"{tmp_path}/model.py:{surrogate}",)), ["test"])
        labels = transfer._surrogate().labels
        assert [transfer.surrogate.classes[label][0] for label in labels] == [wnid[0] for wnid in transfer.images.wnids]
        assert len(labels) == 12 and transfer.images.left_out_classes == ((), ())


def test_numbered_classes_are_those_of_every_model_or_of_none(request_for, tmp_path):
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "images" / name).rename(tmp_path / "images" / str(number))
    for models in (("build",), ("build", "build_scaled"), ("build_reordered",)):
        *_, last = prepare_evaluations(request_for(*models), ["test"])
        assert sorted(last.images.labels) == [0] * 4 + [1] * 4 + [2] * 4
        assert [last.classifier.classes[label] for label in last.images.labels] == list(last.images.wnids)
    with pytest.raises(DataError, match="the models count theirs differently; evaluate one after the other"):
        prepare_evaluations(request_for("build", surrogates=(f"{tmp_path}/model.py:build_reordered",)), ["test"])


def test_labels_follow_each_model_and_images_are_shared(request_for):
    first, second = prepare_evaluations(request_for("build", "build_other_classes"), ["test"])
    assert first.images.keys == second.images.keys
    assert set(first.images.wnids) == {"bee", "cat"}
    assert first.images.left_out_count == second.images.left_out_count == 4
    assert [first.classifier.classes[label] for label in first.images.labels] == list(first.images.wnids)
    assert [second.classifier.classes[label] for label in second.images.labels] == list(second.images.wnids)
    assert first.images.labels != second.images.labels


def test_images_are_read_once_for_all_models(request_for, monkeypatch):
    scans = []
    monkeypatch.setattr(
        "lrrobust.run.build_evaluation_set",
        lambda *given, **options: scans.append(given) or build_evaluation_set(*given, **options),
    )
    first, second = prepare_evaluations(request_for("build", "build_other_classes", n=4, balanced=True), ["test"])
    assert len(scans) == 1
    assert torch.equal(first.images.load(range(4))[0], second.images.load(range(4))[0])


def test_manifest_says_what_was_asked(request_for):
    (evaluation,) = prepare_evaluations(request_for("build", n=6, seed=3, balanced=True), ["lrrobust", "eval"])
    manifest = evaluation.manifest
    assert manifest["command"] == ["lrrobust", "eval"]
    assert len(manifest["class_names"]) == manifest["model"]["num_classes"]
    assert manifest["dataset"]["n"] == 6
    assert manifest["dataset"]["subset"] == {"n": 6, "seed": 3, "balanced": True}
    assert manifest["attacks"][0]["eps"] == [x / 255 for x in (0.125, 0.25, 0.5, 1, 2, 4)]
    # Of builds for CUDA only the module says for which.
    assert torch.__version__.startswith(manifest["provenance"]["versions"]["torch"])
    assert evaluation.folder.name.endswith(manifest["fingerprint"][:10])


@pytest.mark.parametrize(
    ("factories", "options", "error", "message"),
    [
        (("build",), {"chunk_size": 0}, ConfigError, "--chunk-size must be from 1 to 2147483647, got 0"),
        (("build",), {"batch_size": 0}, ConfigError, "--batch-size must be from 1 to 2147483647, got 0"),
        (("build",), {"precision": "fp16"}, ConfigError, "pgd: precision: expected 'float32' or 'bf16', found 'fp16'"),
        (("build",), {"weights": ("a", "b")}, ConfigError, "got 2 for 1 models"),
        (("build",), {"device": "warp"}, ConfigError, "--device 'warp' cannot be used here .only cpu and cuda are supported"),
        (("build",), {"device": "cuda:99"}, ConfigError, "--device 'cuda:99' cannot be used here .*: try cpu or auto$"),
        (("build_stranger",), {}, DataError, "emu|class"),
        (("build", "build_stranger"), {}, DataError, "class"),
        (("build",), {"n": 13}, DataError, "13.*12"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(request_for, tmp_path, factories, options, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare_evaluations(request_for(*factories, **options), ["test"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_request_survives_its_record(request_for, tmp_path):
    request = request_for(
        "build", "build_scaled", n=5, seed=3, eps=("1/255",), indices=tmp_path / "indices.txt", weights=("a", "b"), device="cpu"
    )
    record = json.loads(json.dumps(request.record()))
    assert not {"device", "out"} & record.keys()
    # Where it is computed and where results go are no part of what is asked.
    again = EvaluationRequest.from_record(record, device="cpu", out=request.out)
    assert again == request


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "20"}, "steps.*'20'"),
        ({"steps": True}, "steps.*True"),
        ({"models": "build"}, "models.*'build'"),
        ({"models": [3]}, "models.0"),
        ({"out": "/etc"}, "'out'"),
        ({"shell": "rm"}, "'shell'"),
    ],
)
def test_a_record_is_read_strictly(request_for, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        EvaluationRequest.from_record({**request_for("build").record(), **change})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="models"):
        EvaluationRequest.from_record({"attacks": ["pgd"]})
