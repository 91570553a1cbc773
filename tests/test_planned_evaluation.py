import dataclasses

import pytest
import torch

from lrrobust.results import fingerprint_of
from lrrobust.results.manifest import identity_of
from lrrobust.run import prepare_evaluations


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


def test_fingerprint_is_pinned():
    # Another value here would make every stored run unresumable.
    identity = {"b": [1, 2.5, None], "a": {"eps": 4 / 255}}
    assert fingerprint_of(identity) == "82339750e534c4b584a17ad7bc273136776e92be6f0c26368cc860375f34128c"
    assert fingerprint_of(dict(reversed(identity.items()))) == fingerprint_of(identity)


def test_identity_has_these_parts_and_no_others(request_for):
    # A part added or dropped changes the fingerprint of every stored run: do it on purpose, with ROWS_VERSION.
    (evaluation,) = prepare_evaluations(request_for("build"), ["test"])
    about_the_session = {"fingerprint", "created_at", "command", "class_names", "provenance", "request", "position"}
    assert set(evaluation.manifest) - about_the_session == {
        "schema_version",
        "rows_version",
        "model",
        "dataset",
        "attacks",
        "plan",
        "seed",
        "precision",
    }
    assert evaluation.manifest["fingerprint"] == fingerprint_of(identity_of(evaluation.manifest))
    assert set(evaluation.manifest["plan"]) == {"chunk_size", "batch_size", "parts"}
    assert set(evaluation.manifest["model"]) == {
        "name",
        "weights",
        "state_sha256",
        "code_sha256",
        "classes_sha256",
        "num_classes",
        "input_size",
        "resize_size",
        "interpolation",
    }


def test_fingerprint_follows_the_code_of_the_model(request_for, tmp_path):
    request = request_for("build")
    base = fingerprint(request)
    # The same parameters, another function of them.
    model = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(model + "\n# changed\n")
    assert fingerprint(request) != base


def test_fingerprint_follows_the_code_of_its_layers_beside_it(request_for, tmp_path):
    model = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(
        "import unrelated\nfrom layers import Twice\n" + model.replace("nn.Flatten()", "nn.Flatten(), Twice()")
    )
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
    model = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text("from layers import Wide\n" + model.replace("nn.Flatten()", "nn.Flatten(), Wide()"))
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
