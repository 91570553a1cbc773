"""Files from anywhere, thousands of broken ones: each is read, or refused in one line; nothing else may happen."""

import gzip
import io
import lzma
import random
import tarfile
import tempfile
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_safetensors

from lrrobust.attacks.suite import load_suite
from lrrobust.check.baseline import Baseline, read_baseline
from lrrobust.data.class_lists import load_class_list
from lrrobust.data.image_source import CorruptImageError
from lrrobust.data.sources import open_dataset
from lrrobust.data.subset import read_indices
from lrrobust.errors import BaselineError, ConfigError, DataError, LrRobustError, WeightsError
from lrrobust.models.weights import read_weights
from lrrobust.training.recipe import load_recipe

#: The same cases on every machine: a failure in CI is one that everybody can repeat.
fuzz = settings(
    max_examples=250,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder for all cases: only the file under test is in it."""
    return tmp_path_factory.mktemp("untrusted")


def reads_or_refuses(read, *refusals):
    """What was read; None where it was refused in one line by one of the errors expected."""
    try:
        return read()
    except LrRobustError as error:
        assert isinstance(error, refusals), repr(error)
        assert "\n" not in str(error) and 10 < len(str(error)) < 2000
        return None


# --- configurations ----------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["kind", "norm", "eps", "steps", "restarts", "random_start", "lr", "name", "attacks", "description", "epochs", "yes", "1"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    | st.sampled_from(["pgd", "fgsm", "cw", "suite", "linf", "l2", "8/255", "1/0", "-1/255", "nan", "9" * 50, "./x.yaml"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), v, max_size=4), max_leaves=8
)
GOOD_PGD = {"kind": "pgd", "norm": "linf", "eps": ["1/255", "2/255"], "steps": 5, "restarts": 2}


LOADERS = {"attack": lambda path: load_suite([path]), "recipe": lambda path: load_recipe(str(path))}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
class TestConfigurations:
    @fuzz
    @given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def test_any_bytes(self, place, load, content):
        (place / "x.yaml").write_bytes(content)
        assert reads_or_refuses(lambda: load(place / "x.yaml"), ConfigError) is None

    @fuzz
    @given(document=st.dictionaries(KEYS, VALUES, max_size=6), base=st.sampled_from([{}, GOOD_PGD, {"kind": "suite"}]))
    def test_any_values(self, place, load, document, base):
        (place / "x.yaml").write_text(yaml.safe_dump({**base, **document}, allow_unicode=True), encoding="utf-8")
        read = reads_or_refuses(lambda: load(place / "x.yaml"), ConfigError)
        for spec in read if isinstance(read, tuple) else ():
            assert all(0 <= eps < float("inf") for eps in spec.eps) and list(spec.eps) == sorted(set(spec.eps))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch hacked']", "kind: !!python/name:os.system x", "a: &a [*a]",
        "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "[" * 20_000, "{a: " * 5_000, "kind: pgd\n" * 2, "\ufeffkind: 7",
        "a: 2026-02-31", "--- 1\n--- 2", "%YAML 9.9\n--- {}", "kind: \"\\ud800\"", "? [x]\n: y", "<<: {kind: pgd}", "1" * 5000,
    ],
)  # fmt: skip
def test_known_attacks_on_yaml(place, monkeypatch, text):
    monkeypatch.chdir(place)
    (place / "x.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert reads_or_refuses(lambda: load_suite(["x.yaml"]), ConfigError) is None
    assert not (place / "hacked").exists()


# --- archives ----------------------------------------------------------------------------------------


FORMATS = ("PNG", "BMP", "JPEG", "WEBP")


def image_bytes(format):
    out = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(out, format)
    return out.getvalue()


MEMBERS = {f"{name}.{kind.lower()}": image_bytes(kind) for name, kind in zip(("a/1", "a/2", "b/3", "b/4"), FORMATS)}


def pack(suffix, members):
    out = io.BytesIO()
    if suffix == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            warnings.simplefilter("ignore")  # two members of one name
            for name, content in members:
                archive.writestr(name.replace("\0", ""), content)  # which zipfile cuts names at
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {".tar": bytes, ".tar.gz": gzip.compress, ".tar.xz": lzma.compress}[suffix](out.getvalue())


SUFFIXES = (".zip", ".tar", ".tar.gz", ".tar.xz")
ARCHIVES = {suffix: pack(suffix, list(MEMBERS.items())) for suffix in SUFFIXES}


def read_images(path):
    source = open_dataset(path)
    decoded = {}
    for index, key in enumerate(source.keys):
        try:
            decoded[key] = source.decode(index, source.read_bytes(index)).size
        except CorruptImageError as error:
            assert "\n" not in str(error)
    return decoded


def mutate(content, seed):
    """A few bytes changed, taken out or doubled; or cut short."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind <= 1:
            data[at] = rng.choice([0, 0xFF, rng.randrange(256)])
        elif kind == 2:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
class TestArchives:
    def test_the_whole_one_is_read(self, place, suffix):
        (place / f"x{suffix}").write_bytes(ARCHIVES[suffix])
        assert read_images(place / f"x{suffix}") == dict.fromkeys(MEMBERS, (8, 8))

    @fuzz
    @given(seed=st.integers(0, 2**32))
    def test_damaged_ones(self, place, suffix, seed):
        path = place / f"x{suffix}"
        path.write_bytes(mutate(ARCHIVES[suffix], seed))
        read = reads_or_refuses(lambda: read_images(path), DataError)
        assert read is None or all(max(size) <= 64_000_000 for size in read.values())
        assert [each.name for each in place.iterdir() if each.name.startswith("x") and each.suffix != ".yaml"]

    @fuzz
    @given(
        names=st.lists(
            st.text(st.sampled_from("ab/.\\\0:~ \n\u202eé"), max_size=12).map(lambda name: name + ".png")
            | st.sampled_from(["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a/1.png", "val/a/1.png"]),
            max_size=4,
        )
    )
    def test_any_names(self, tmp_path_factory, suffix, names):
        with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as outer:
            folder = Path(outer, "in", "ner")
            folder.mkdir(parents=True)
            path = folder / f"x{suffix}"
            path.write_bytes(pack(suffix, [(name, MEMBERS["a/1.png"]) for name in names]))
            reads_or_refuses(lambda: read_images(path), DataError)
            assert [p.relative_to(outer).as_posix() for p in Path(outer).rglob("*")] == ["in", "in/ner", f"in/ner/x{suffix}"]


@fuzz
@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 2**32))
def test_damaged_images(tmp_path_factory, format, seed):
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        path = Path(folder, "a", "1.png")
        path.parent.mkdir()
        path.write_bytes(mutate(image_bytes(format), seed))
        reads_or_refuses(lambda: read_images(folder), DataError)


# --- weights, baselines, lists -----------------------------------------------------------------------


def weights_files():
    state = {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4)}
    out = io.BytesIO()
    torch.save(state, out)
    return {".safetensors": save_safetensors(state), ".pt": out.getvalue()}


WEIGHTS = weights_files()


@pytest.mark.parametrize("suffix", WEIGHTS)
@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_weights(place, suffix, seed):
    path = place / f"weights{suffix}"
    path.write_bytes(mutate(WEIGHTS[suffix], seed))
    read = reads_or_refuses(lambda: read_weights(path), WeightsError)
    assert read is None or all(isinstance(tensor, torch.Tensor) for tensor in read[0].values())


@pytest.fixture(scope="module")
def gate_baseline():
    return (Path(__file__).parent / "check" / "gate" / "baseline.json").read_bytes()


@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_baselines(place, gate_baseline, seed):
    path = place / "b.json"
    path.write_bytes(mutate(gate_baseline, seed))
    read = reads_or_refuses(lambda: read_baseline(path), BaselineError)
    assert read is None or isinstance(read, Baseline)


@fuzz
@given(content=st.binary(max_size=60) | st.text(st.sampled_from("0123456789 #\n-+.\u0663\x00"), max_size=40).map(str.encode))
def test_any_lists(place, content):
    (place / "list.txt").write_bytes(content)
    indices = reads_or_refuses(lambda: read_indices(place / "list.txt"), DataError)
    assert indices is None or (indices and min(indices) >= 0 and len(set(indices)) == len(indices))
    classes = reads_or_refuses(lambda: load_class_list(str(place / "list.txt")), LrRobustError)
    assert classes is None or (classes and len(set(classes)) == len(classes))
