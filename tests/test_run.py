import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.errors import ConfigError, DataError
from lrrobust.results import fingerprint_of
from lrrobust.results.manifest import identity_of
from lrrobust.run import EvaluationRequest, prepare_evaluations

MODEL = """
import torch
from torch import nn
from lrrobust.models import Classifier

def make(classes, scale=1.0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, len(classes)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return Classifier(network, classes, input_size=8)

def build(): return make(("ant", "bee", "cat"))
def build_scaled(): return make(("ant", "bee", "cat"), 2.0)
def build_reordered(): return make(("cat", "bee", "ant"))
def build_other_classes(): return make(("bee", "cat", "dog"))
def build_stranger(): return make(("emu", "fox"))
def build_accents(): return make(("ant", "b\\u00e9e", "cat"))
def build_two_characters(): return make(("be\\u0301e", "ant", "cat"))
"""


@pytest.fixture
def request_for(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / name / f"{i}.png")

    def make(*factories, **options):
        models = tuple(f"{tmp_path}/model.py:{factory}" for factory in factories)
        settings = {"attacks": ("pgd",), "dataset": str(tmp_path / "images"), "out": tmp_path / "runs", **options}
        return EvaluationRequest(models=models, **settings)

    return make


def fingerprint(request):
    (evaluation,) = prepare_evaluations(request, ["test"])
    return evaluation.manifest["fingerprint"]


def test_fingerprint_ignores_what_does_not_decide_the_rows(request_for, tmp_path):
    base = fingerprint(request_for("build"))
    assert fingerprint(request_for("build", out=tmp_path / "elsewhere")) == base
    assert fingerprint(request_for("build", device="cpu")) == base
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fingerprint(request_for("build")) == base
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": ("1/255",)},
        {"steps": 3},
        {"restarts": 2},
        {"chunk_size": 5},
        {"batch_size": 5},
        {"precision": "bf16"},
        {"seed": 1},
        {"n": 5},
        {"attacks": ("fgsm",)},
        {"attacks": ("pgd", "fgsm")},
        {"quantize": True},
        {"save_adversarial": True},
    ],
    ids=str,
)
def test_fingerprint_follows_what_decides_the_rows(request_for, change):
    request = request_for("build")
    assert fingerprint(dataclasses.replace(request, **change)) != fingerprint(request)


def test_fingerprint_follows_weights_and_class_order(request_for):
    prints = {fingerprint(request_for(name)) for name in ("build", "build_scaled", "build_reordered")}
    assert len(prints) == 3


def test_fingerprint_follows_the_surrogate(request_for, tmp_path):
    request = request_for("build")
    surrogates = [f"{tmp_path}/model.py:{name}" for name in ("build_scaled", "build_reordered")]
    prints = {fingerprint(dataclasses.replace(request, surrogates=(name,))) for name in surrogates}
    # However a model is attacked in its own stead, that is no transfer.
    assert fingerprint(dataclasses.replace(request, surrogates=request.models)) == fingerprint(request)
    assert len(prints | {fingerprint(request)}) == 3
    (other,) = prepare_evaluations(dataclasses.replace(request, surrogates=surrogates[:1], quantize=True), ["test"])
    assert other.manifest["fingerprint"] == fingerprint_of(identity_of(other.manifest))


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


def test_fingerprint_is_pinned():
    # Another value here would make every stored run unresumable.
    identity = {"b": [1, 2.5, None], "a": {"eps": 4 / 255}}
    assert fingerprint_of(identity) == "82339750e534c4b584a17ad7bc273136776e92be6f0c26368cc860375f34128c"
    assert fingerprint_of(dict(reversed(identity.items()))) == fingerprint_of(identity)


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
    monkeypatch.setattr("lrrobust.run.build_evaluation_set", lambda *given, **options: scans.append(given) or build_evaluation_set(*given, **options))
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
    assert manifest["provenance"]["versions"]["torch"] == torch.__version__
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


def test_identity_has_these_parts_and_no_others(request_for):
    # A part added or dropped changes the fingerprint of every stored run: do it on purpose, with ROWS_VERSION.
    (evaluation,) = prepare_evaluations(request_for("build"), ["test"])
    about_the_session = {"fingerprint", "created_at", "command", "class_names", "provenance", "request", "position"}
    assert set(evaluation.manifest) - about_the_session == {
        "schema_version", "rows_version", "model", "dataset", "attacks", "plan", "seed", "precision",
    }
    assert evaluation.manifest["fingerprint"] == fingerprint_of(identity_of(evaluation.manifest))
    assert set(evaluation.manifest["plan"]) == {"chunk_size", "batch_size", "parts"}
    assert set(evaluation.manifest["model"]) == {
        "name", "weights", "state_sha256", "code_sha256", "classes_sha256", "num_classes", "input_size", "resize_size",
        "interpolation",
    }


def test_fingerprint_follows_the_code_of_the_model(request_for, tmp_path):
    request = request_for("build")
    base = fingerprint(request)
    # The same parameters, another function of them.
    (tmp_path / "model.py").write_text(MODEL + "\n# changed\n")
    assert fingerprint(request) != base


def test_fingerprint_follows_the_code_of_its_layers_beside_it(request_for, tmp_path):
    (tmp_path / "model.py").write_text("import unrelated\nfrom layers import Twice\n" + MODEL.replace("nn.Flatten()", "nn.Flatten(), Twice()"))
    (tmp_path / "unrelated.py").write_text("")
    layers = tmp_path / "layers.py"
    layer = "from torch import nn\n\nclass Twice(nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    found = []
    for code, unrelated in ((layer, ""), (layer.replace("2 * x", "3 * x"), ""), (layer, "import os\n")):
        layers.write_text(code)
        (tmp_path / "unrelated.py").write_text(unrelated)
        found.append(fingerprint(request_for("build")))
    assert found[0] != found[1] and found[0] == found[2]


def test_code_of_layers_is_found_however_it_is_written_and_named(request_for, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text("from layers import Wide\n" + MODEL.replace("nn.Flatten()", "nn.Flatten(), Wide()"))
    # No function of its own, and one that is wrapped by torch's; an attribute that claims to have everything.
    layers = tmp_path / "layers.py"
    code = (
        "import torch\nfrom torch import nn\n\nclass Base(nn.Module):\n    ops = torch.ops\n    @torch.no_grad()\n"
        "    def forward(self, x):\n        return self.factor * x\n\nclass Wide(Base):\n    factor = 2\n"
    )
    layers.write_text(code)
    request = request_for("build")
    base = fingerprint(request)
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    assert fingerprint(dataclasses.replace(request, models=(f"{tmp_path}/linked/model.py:build",))) == base
    monkeypatch.chdir(tmp_path)
    assert fingerprint(dataclasses.replace(request, models=("./model.py:build",))) == base
    layers.write_text(code.replace("factor = 2", "factor = 3"))
    assert fingerprint(request) != base


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
