"""Run folders from anywhere: whatever stands in them, it is read, or refused in one line, and the page runs none of it."""

import copy
import json
import os
import shutil
from datetime import timedelta
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrrobust.errors import LrRobustError
from lrrobust.report.drawing import Drawers
from lrrobust.report.figures import sketch_runs
from lrrobust.report.notices import mixed_metadata, warnings_of
from lrrobust.report.summary import summarise
from lrrobust.results import load_examples, load_run, parts
from lrrobust.results.parts import sealed_parquet
from lrrobust.verdict.claims import DEFAULT_CLAIM, load_claim
from lrrobust.verdict.judge import judge_claims

HOSTILE = "<script>alert('x')</script>&\"'</style><img src=x onerror=alert(1)>"
fuzz = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HOSTILE)
    | st.sampled_from(["../../etc/passwd", "linf", "9" * 50, "\ud800", "a\nb", 10**400, -1, 2**70])
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("name"), SCALARS, max_size=3)


@pytest.fixture
def folder(make_run, tmp_path):
    """A run that every case damages anew, and another beside it to be compared with."""
    make_run("whole")
    make_run("other", model="other")
    whole = tmp_path / "runs" / "whole"

    def fresh():
        target = tmp_path / "runs" / "run"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(whole, target)
        return target

    return fresh


def read_all(folder):
    """All that a report does with a run but the page; None where the run was refused in one line."""
    claim = load_claim(DEFAULT_CLAIM).model_copy(update={"treatment": "tiny", "control": "other"})
    try:
        run, other = load_run(folder), load_run(folder.parent / "other")
        load_examples(run)
        summarise([run, other])
        warnings_of(run), mixed_metadata(run)
        judge_claims([claim], [run, other])
    except LrRobustError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 3000
        return None
    return run


def paths_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def replaced(document, path, value):
    document = copy.deepcopy(document)
    if not path:
        return value
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


@fuzz
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest(folder, data):
    run = folder()
    manifest = json.loads((run / "manifest.json").read_bytes())
    path = data.draw(st.sampled_from(list(paths_in(manifest))))
    changed = replaced(manifest, path, data.draw(VALUES))
    (run / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
    read_all(run)


@fuzz
@given(data=st.data())
def test_any_key_missing_from_a_manifest(folder, data):
    run = folder()
    manifest = json.loads((run / "manifest.json").read_bytes())
    path = data.draw(st.sampled_from([path for path in paths_in(manifest) if path]))
    at = manifest
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    (run / "manifest.json").write_text(json.dumps(manifest))
    read_all(run)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"null", b'"' + b"9" * 5000, b"9" * 5000])
def test_a_manifest_of_any_bytes(folder, content):
    run = folder()
    (run / "manifest.json").write_bytes(content)
    assert read_all(run) is None


@fuzz
@given(data=st.data())
def test_any_damage_to_a_file_is_noticed(folder, data, caplog):
    run = folder()
    files = sorted((run / "parts").iterdir()) + sorted((run / "examples").iterdir())
    victim = data.draw(st.sampled_from(files))
    content = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "zeros"]))
    if how == "cut":
        content = content[:place]
    elif how == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif how == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        content[:] = bytes(len(content))
    victim.write_bytes(content)
    caplog.clear()
    found = read_all(run)
    assert found is not None and victim.name in caplog.text
    assert found.is_complete == (victim.parent.name != "parts")
    # What is left are right rows.
    whole = load_run(run.parent / "whole").rows
    assert len(found.rows.merge(whole.drop_duplicates(["index", "attack", "eps"]))) == len(found.rows)


@pytest.mark.parametrize("name", ["manifest.json", "parts/pgd-000000-000006.parquet", "examples/pgd-000000-000006.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
def test_no_file_has_us_wait_or_never_ends(folder, kind, name):
    run = folder()
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to("/dev/zero" if kind == "device" else run / "nothing")
    found = read_all(run)
    assert (
        (found is not None and found.is_complete == (name[0] == "e"))
        if kind == "dangling" and name[0] != "m"
        else found is None
    )


def test_a_part_that_unpacks_to_more_than_anybody_has(folder, caplog, monkeypatch):
    run = folder()
    path = run / "parts" / "pgd-000000-000006.parquet"
    resealed(path, lambda table: pa.concat_tables([table] * 20_000).combine_chunks())
    assert path.stat().st_size < 2_000_000
    monkeypatch.setattr(parts, "_MOST_BYTES", 4_000_000)
    assert not read_all(run).is_complete
    assert "unpacks to more than 4,000,000 bytes" in caplog.text


def with_column(table, name, values):
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def without_rows(table):
    return table.slice(0, 0)


def with_a_row_less(table):
    return table.slice(1)


def with_another_label(table):
    return with_column(table, "label", pa.array([9, *table["label"].to_pylist()[1:]], pa.int32()))


def with_rows_twice(table):
    return pa.concat_tables([table, table])


@pytest.mark.parametrize("change", [without_rows, with_a_row_less, with_another_label, with_rows_twice])
def test_rows_that_contradict_each_other_are_left_out(folder, caplog, change):
    run = folder()
    resealed(run / "parts" / "pgd-000000-000006.parquet", change)
    found = read_all(run)
    assert not found.is_complete and set(found.rows["attack"]) == {"cw"}
    assert "holds what no evaluation writes" in caplog.text


def test_images_without_their_rows_are_not_shown(folder, write, tmp_path):
    """As a process leaves them that is killed between the two."""
    run = folder()
    (run / "parts" / "cw-000000-000006.parquet").unlink()
    assert list(load_examples(load_run(run))) == ["pgd"]
    (run / "parts" / "pgd-000000-000006.parquet").unlink()
    write([load_run(run), load_run(run.parent / "other")], tmp_path / "page")


def resealed(path, change):
    """Rewrites a part as somebody would who knows how seals are made."""
    file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
    metadata = {k.decode(): v.decode() for k, v in file.metadata.metadata.items() if k not in (b"ARROW:schema", b"seal")}
    path.write_bytes(sealed_parquet(change(file.read()), metadata))


@fuzz
@given(data=st.data())
def test_any_value_in_a_sealed_part(folder, data):
    run = folder()
    path = data.draw(st.sampled_from(sorted((run / "parts").iterdir()) + sorted((run / "examples").iterdir())))
    kinds = {
        pa.string(): st.text(max_size=5).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)) | st.just(HOSTILE),
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
        pa.int32(): st.integers(-(2**31), 2**31 - 1),
        pa.float64(): st.floats(),
        pa.bool_(): st.booleans(),
        pa.binary(): st.binary(max_size=9),
    }

    def change(table):
        field = table.schema.field(data.draw(st.integers(0, table.num_columns - 1)))
        values = table[field.name].to_pylist()
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(
            kinds[field.type] | (st.none() if field.nullable else st.nothing())
        )
        return with_column(table, field.name, pa.array(values, type=field.type))

    resealed(path, change)
    read_all(run)


def test_text_that_is_none_in_a_sealed_part(folder, caplog):
    run = folder()
    path = run / "parts" / "pgd-000000-000006.parquet"

    def change(table):
        bad = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], "i4").tobytes()), pa.py_buffer(b"\xff\xfe")]
        )
        return with_column(table, "key", pa.concat_arrays([bad] * table.num_rows))

    resealed(path, change)
    assert not read_all(run).is_complete
    assert "holds what no evaluation writes" in caplog.text


@fuzz
@given(
    document=st.recursive(
        SCALARS,
        lambda v: (
            st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["name", "passed", "detail", "attack"]), v, max_size=4)
        ),
        max_leaves=10,
    )
    | st.binary(max_size=30)
)
def test_any_diagnostics(folder, document):
    run = folder()
    (run / "diagnostics.json").write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    read_all(run)


class Script(HTMLParser):
    """What of a page a browser would run or fetch."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.handlers, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "iframe", "object", "embed", "base", "form"):
            self.scripts.append((tag, dict(attributes).get("type")))
        for name, value in attributes:
            if name.startswith("on"):
                self.handlers.append(name)
            if name in ("src", "href", "data", "action", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(value)


TEXTS = (HOSTILE, "</script><script>alert(1)</script>", "{{ 7 * 7 }}{% raw %}", "javascript:alert(1)", "\u2028--><!--")


def test_no_text_of_a_run_becomes_part_of_the_page(folder, write, tmp_path):
    whole = folder()
    manifest = json.loads((whole / "manifest.json").read_bytes())
    drawings = None
    # Every text once in every place; figures, which take the time, are drawn of one of the mixtures.
    for shift in range(len(TEXTS)):
        run, hostile = folder(), manifest
        for number, path in enumerate(paths_in(manifest)):
            at = manifest
            for key in path:
                at = at[key]
            # Names of attacks are checked: no evaluation has others.
            if isinstance(at, str) and path[0] not in ("fingerprint", "attacks", "plan"):
                hostile = replaced(hostile, path, TEXTS[(number + shift) % len(TEXTS)])
        (run / "manifest.json").write_text(json.dumps(hostile))
        for path in (run / "parts").iterdir():
            resealed(path, lambda table: with_column(table, "wnid", pa.array([TEXTS[shift]] * table.num_rows)))
        loaded = [load_run(run), load_run(run.parent / "other")]
        if drawings is None:
            with Drawers() as drawers:
                drawings = drawers.begin(sketch_runs(loaded, summarise(loaded), ["svg"]))()
        path, *_ = write(loaded, tmp_path / "page", command=["lrrobust", "report", TEXTS[shift]], draw=lambda: drawings)
        page = path.read_text(encoding="utf-8")
        found = Script(page)
        assert found.scripts == [("script", "application/json"), ("script", None)]
        assert not found.handlers and not found.fetched
        # Shown as it stands, not computed.
        assert "{{ 7 * 7 }}{% raw %}" in page
