import errno
import json
import math
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_rows import build_row

from lrrobust.errors import StoreError
from lrrobust.results import (
    SCHEMA_VERSION,
    Example,
    RunStore,
    find_runs,
    fingerprint_of,
    load_examples,
    load_run,
    rows_to_table,
    write_file,
)
from lrrobust.results.manifest import identity_of

PARTS = [["pgd", 0, 3], ["pgd", 3, 6], ["fgsm", 0, 3], ["fgsm", 3, 6]]
MANIFEST = {
    "schema_version": SCHEMA_VERSION,
    "fingerprint": "ab" * 32,
    "model": {"name": "tiny", "weights": None},
    "dataset": {"name": "sample", "sha256": "cd" * 32, "n": 6},
    "attacks": [{"name": "pgd", "norm": "linf", "kind": "pgd"}, {"name": "fgsm", "norm": "linf", "kind": "fgsm"}],
    "plan": {"chunk_size": 3, "parts": PARTS},
    "seed": 0,
    "provenance": {"host": "first"},
}
DEVICE = {"device": "cpu"}


def chunk(attack, start, stop):
    """Rows of which every other is broken, at two eps."""
    return rows_to_table(
        [
            build_row(index, attack, "linf", eps, eps if index % 2 else math.inf)
            for index in range(start, stop)
            for eps in (0.01, 0.02)
        ]
    )


def write(store, part):
    store.write_part(*part, chunk(*part), DEVICE)


def create(folder):
    RunStore.create_or_resume(folder, MANIFEST).close()


def temporary_files(folder):
    return list(folder.rglob("*.tmp"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "new" / "run"


@pytest.fixture
def store(folder):
    with RunStore.create_or_resume(folder, MANIFEST) as store:
        yield store


@pytest.fixture
def part_file(store, folder):
    write(store, PARTS[0])
    return folder / "parts" / "pgd-000000-000003.parquet"


class TestManifest:
    def test_new_folder_gets_it(self, folder):
        create(folder)
        assert json.loads((folder / "manifest.json").read_text()) == MANIFEST | {"sessions": []}

    def test_resume_keeps_it_and_adds_a_session(self, folder):
        create(folder)
        for host in ("second", "third"):
            with RunStore.create_or_resume(folder, MANIFEST | {"provenance": {"host": host}}) as store:
                found = json.loads((folder / "manifest.json").read_text())
                assert store.manifest == found
        sessions = found.pop("sessions")
        assert found == MANIFEST
        assert [session["provenance"]["host"] for session in sessions] == ["second", "third"]
        assert pd.Timestamp(sessions[0]["started_at"]).tzinfo is not None

    def test_another_fingerprint_is_refused(self, folder):
        create(folder)
        other = MANIFEST | {"fingerprint": "ef" * 32, "seed": 1, "model": {"name": "big"}, "provenance": {}}
        before = (folder / "manifest.json").read_bytes()
        with pytest.raises(StoreError, match=r"holds another run .*differing: model, seed\)") as caught:
            RunStore.create_or_resume(folder, other)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert (folder / "manifest.json").read_bytes() == before
        create(folder)  # the refusal let go of the lock

    @pytest.mark.parametrize("content", [b"", b'{"schema_version": 2, "finge', b"[1]", b"{}", b"\xff\xfe\x00"])
    def test_damage_is_refused_by_writer_and_reader(self, folder, content):
        create(folder)
        (folder / "manifest.json").write_bytes(content)
        for open_run in (lambda: RunStore.create_or_resume(folder, MANIFEST), lambda: load_run(folder)):
            with pytest.raises(StoreError, match="manifest.json is damaged .*restore it from a copy"):
                open_run()
        assert (folder / "manifest.json").read_bytes() == content

    def test_a_report_that_was_killed_in_its_folder_is_in_nobodys_way(self, folder):
        create(folder)
        (folder / ".lrrobust-report.tmp").mkdir()
        create(folder)

    def test_a_request_of_fewer_weights_than_models_is_damage(self, folder):
        create(folder)
        request = {"models": ["a", "b"], "weights": ["a.pt"]}
        (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"request": request, "position": 1}))
        with pytest.raises(StoreError, match="damaged .request: expected weights for each of the models, or none"):
            load_run(folder)

    def test_another_schema_is_refused(self, folder):
        create(folder)
        (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"schema_version": 99}))
        with pytest.raises(StoreError, match="schema 99, this lrrobust reads 2"):
            load_run(folder)

    def test_parts_without_manifest_are_not_adopted(self, folder):
        create(folder)
        (folder / "manifest.json").unlink()
        with pytest.raises(StoreError, match="parts of a run but no manifest.json"):
            RunStore.create_or_resume(folder, MANIFEST)

    @pytest.mark.parametrize("change", [{"schema_version": 1}, {"fingerprint": "xyz"}, {"eps": float("inf")}])
    def test_a_wrong_one_is_a_defect_of_the_caller(self, folder, change):
        with pytest.raises(ValueError):
            RunStore.create_or_resume(folder, MANIFEST | change)
        assert not folder.exists()


class TestParts:
    def test_rows_come_back_in_the_order_of_the_manifest(self, store, folder):
        for part in reversed(PARTS):
            write(store, part)
        rows = store.read_rows()
        assert list(rows["attack"]) == ["pgd"] * 12 + ["fgsm"] * 12
        assert list(rows["index"]) == sorted(list(range(6)) * 2) * 2
        run = load_run(folder)
        assert run.is_complete and run.manifest == store.manifest
        pd.testing.assert_frame_equal(run.rows, rows)

    def test_nulls_stay_nulls_and_integers_integers(self, store):
        write(store, PARTS[0])
        rows = store.read_rows()
        assert rows["adversarial_prediction"].dtype == "int32[pyarrow]"
        assert rows["adversarial_prediction"].isna().tolist() == [True, True, False, False, True, True]
        assert rows["forward_passes"].isna().all() and rows["forward_passes"].dtype == "int64[pyarrow]"

    def test_a_run_without_parts_has_no_rows_but_all_columns(self, store, folder):
        run = load_run(folder)
        assert len(run.rows) == 0 and "l2_distance" in run.rows and not run.is_complete

    def test_knows_which_parts_it_has(self, store):
        write(store, PARTS[0])
        write(store, PARTS[3])
        assert [store.has_part(*part) for part in PARTS] == [True, False, False, True]
        assert not load_run(store.folder).is_complete

    def test_any_parquet_reader_reads_them(self, part_file):
        assert pq.read_table(part_file).equals(chunk(*PARTS[0]))
        assert pq.read_metadata(part_file).metadata[b"device"] == b"cpu"

    def test_metadata_comes_back(self, store, folder, part_file):
        assert load_run(folder).part_metadata == {"pgd-000000-000003": DEVICE}

    def test_a_flipped_bit_anywhere_is_detected(self, store, folder, part_file):
        content = part_file.read_bytes()
        positions = random.Random(0).sample(range(len(content)), 150)
        positions += [0, len(content) - 1, len(content) - 5, content.index(b"lrrobust-part-sha256") + 30]
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            part_file.write_bytes(damaged)
            assert load_run(folder).rows.empty, position
            assert not store.has_part(*PARTS[0]), position
        part_file.write_bytes(content)
        assert store.has_part(*PARTS[0])

    @pytest.mark.parametrize("keep", [0, 1, 4, 100, -100, -1])
    def test_truncation_is_detected(self, store, part_file, keep):
        part_file.write_bytes(part_file.read_bytes()[:keep])
        assert not store.has_part(*PARTS[0])

    def test_a_damaged_part_is_moved_aside_aloud_and_can_be_redone(self, store, part_file, caplog):
        content = part_file.read_bytes()
        part_file.write_bytes(content[:-9])
        assert not store.has_part(*PARTS[0])
        assert "is truncated or damaged; moved to pgd-000000-000003.parquet.damaged" in caplog.text
        assert not part_file.exists()
        assert part_file.with_name(part_file.name + ".damaged").read_bytes() == content[:-9]
        write(store, PARTS[0])
        assert store.has_part(*PARTS[0])

    def test_a_part_of_another_run_or_name_is_not_used(self, store, part_file, tmp_path, caplog):
        with RunStore.create_or_resume(tmp_path / "other", MANIFEST | {"fingerprint": "ef" * 32}) as other:
            write(other, PARTS[0])
            content = (other.folder / "parts" / part_file.name).read_bytes()
        renamed = part_file.with_name("pgd-000003-000006.parquet")
        renamed.write_bytes(part_file.read_bytes())
        part_file.write_bytes(content)
        assert not store.has_part(*PARTS[0]) and "was written for another fingerprint" in caplog.text
        assert not store.has_part(*PARTS[1]) and "was written for another part" in caplog.text

    def test_parts_outside_the_plan_are_not_read(self, store, folder):
        store.write_part("pgd", 2, 5, chunk("pgd", 2, 5), DEVICE)
        assert load_run(folder).rows.empty

    def test_without_a_plan_the_parts_found_are_read(self, folder):
        manifest = {key: value for key, value in MANIFEST.items() if key != "plan"}
        with RunStore.create_or_resume(folder, manifest) as store:
            store.write_part("a-1", 1000000, 1000001, chunk("a-1", 0, 1), DEVICE)
            write(store, PARTS[2])
            write(store, PARTS[0])
            assert list(store.read_rows()["attack"].unique()) == ["pgd", "fgsm", "a-1"]
        assert not load_run(folder).is_complete

    @pytest.mark.parametrize(
        "part, table, message",
        [
            (("pgd", 0, 4), chunk("pgd", 0, 3), "must hold 4 images, got 3"),
            (("fgsm", 0, 3), chunk("pgd", 0, 3), "rows of 'fgsm' only"),
            (("../pgd", 0, 3), chunk("../pgd", 0, 3), "attack names"),
            (("pgd", 3, 3), chunk("pgd", 0, 3), "0 <= start < stop"),
            (("pgd", 0, 3), chunk("pgd", 0, 3).drop_columns("eps"), "rows_to_table"),
        ],
    )
    def test_a_table_that_is_not_the_chunk_is_refused(self, store, part, table, message):
        with pytest.raises(ValueError, match=message):
            store.write_part(*part, table, DEVICE)

    def test_rows_given_twice_are_refused(self, store):
        table = chunk("pgd", 0, 3)
        with pytest.raises(ValueError, match="6 rows twice"):
            store.write_part("pgd", 0, 3, pa.concat_tables([table, table]), DEVICE)


class TestFailingDisk:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_no_room_keeps_what_was_there(self, store, folder, part_file, monkeypatch, call):
        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match="no room on disk .*pgd-000003.*free space and run") as caught:
                write(store, PARTS[1])
        assert "\n" not in str(caught.value)
        assert temporary_files(folder) == []
        assert [store.has_part(*part) for part in PARTS] == [True, False, False, False]

    @pytest.mark.parametrize(
        "code, message",
        [(errno.EACCES, "not allowed to write"), (errno.EROFS, "not allowed to write"), (errno.EIO, "could not write")],
    )
    def test_other_refusals_are_one_line(self, store, monkeypatch, code, message):
        def fail(*_):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(StoreError, match=message):
                write(store, PARTS[0])

    def test_an_interrupt_leaves_no_temporary_file(self, store, folder, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write(store, PARTS[0])
        assert temporary_files(folder) == [] and not store.has_part(*PARTS[0])

    def test_a_folder_that_is_really_read_only(self, tmp_path):
        create(tmp_path / "run")
        _mount("--bind", str(tmp_path), str(tmp_path))
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
            with pytest.raises(StoreError, match="not allowed to write"):
                RunStore.create_or_resume(tmp_path / "run", MANIFEST)
            with pytest.raises(StoreError, match="not allowed to write"):
                RunStore.create_or_resume(tmp_path / "another", MANIFEST)
            assert load_run(tmp_path / "run").rows.empty  # reading needs no permission to write
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(StoreError, match="could not write .*run"):
            RunStore.create_or_resume(tmp_path / "run", MANIFEST)


def _mount(*arguments):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux")
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")


# Writes one part, says so, and waits for a line or, told to, dies between temporary file and rename.
_WRITER = """
import os, signal, sys
from pathlib import Path
from test_store import MANIFEST, PARTS, RunStore, write

store = RunStore.create_or_resume(Path(sys.argv[1]), MANIFEST)
write(store, PARTS[0])
if sys.argv[2] == "die":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write(store, PARTS[1])
print("ready", flush=True)
sys.stdin.readline()
"""


def start_writer(folder, how):
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )


@pytest.mark.skipif(os.name == "nt", reason="needs signals and flock")
class TestOtherProcesses:
    def test_a_second_writer_is_refused_until_the_first_is_gone(self, folder):
        with start_writer(folder, "wait") as writer:
            assert writer.stdout.readline() == "ready\n"
            with pytest.raises(StoreError, match=rf"another lrrobust process \(pid {writer.pid}\) is writing"):
                RunStore.create_or_resume(folder, MANIFEST)
            assert len(load_run(folder).rows) == 6  # readers are not held up
            writer.kill()
        with RunStore.create_or_resume(folder, MANIFEST) as store:
            assert store.has_part(*PARTS[0])

    def test_killed_before_the_rename_leaves_no_part(self, folder):
        with start_writer(folder, "die") as writer:
            assert writer.wait() == -signal.SIGKILL
        assert len(temporary_files(folder)) == 1
        assert len(load_run(folder).rows) == 6
        assert len(temporary_files(folder)) == 1  # a reader changes nothing
        with RunStore.create_or_resume(folder, MANIFEST) as store:
            assert temporary_files(folder) == []
            assert [store.has_part(*part) for part in PARTS] == [True, False, False, False]

    def test_the_lock_goes_with_the_object(self, folder):
        store = RunStore.create_or_resume(folder, MANIFEST)
        with pytest.raises(StoreError, match=rf"pid {os.getpid()}"):
            RunStore.create_or_resume(folder, MANIFEST)
        del store
        store = RunStore.create_or_resume(folder, MANIFEST)
        store.close()
        store.close()
        create(folder)


class TestReading:
    def test_changes_nothing(self, store, folder, part_file):
        part_file.write_bytes(part_file.read_bytes()[:-1])
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert load_run(folder).rows.empty
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_no_run_there(self, tmp_path):
        with pytest.raises(StoreError, match="found no manifest.json: give the folder of a run"):
            load_run(tmp_path)

    def test_finds_runs_below_and_at_the_root(self, tmp_path):
        for name in ("b", "a/deep", "c"):
            create(tmp_path / name)
        (tmp_path / "empty").mkdir()
        assert find_runs(tmp_path) == [tmp_path / "a/deep", tmp_path / "b", tmp_path / "c"]
        assert find_runs(tmp_path / "b") == [tmp_path / "b"]
        assert find_runs(tmp_path / "empty") == []
        with pytest.raises(StoreError, match="expected a folder of runs"):
            find_runs(tmp_path / "nowhere")

    def test_links_lead_to_runs_and_none_is_found_twice(self, tmp_path):
        for name in ("gathered/b", "elsewhere/c"):
            create(tmp_path / name)
        for name, target in {"a": "b", "z": "../elsewhere", "up": ".."}.items():
            (tmp_path / "gathered" / name).symlink_to(target)
        found = find_runs(tmp_path / "gathered")
        assert [path.name for path in found] == ["b", "c"] and found[0] == tmp_path / "gathered/b"

    def test_a_folder_that_cannot_be_listed_is_said(self, tmp_path, monkeypatch, caplog):
        for name in ("mine", "others"):
            create(tmp_path / name)
        listing = os.scandir

        def refuse(path):
            if str(path).endswith("others"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return listing(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert find_runs(tmp_path) == [tmp_path / "mine"]
        assert f"cannot look for runs in {tmp_path / 'others'} (Permission denied)" in caplog.text


def test_write_file_syncs_the_content_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: calls.append(name) or call(*args))
    write_file(tmp_path / "x.txt", b"content")
    assert calls == ["fsync", "replace"] + ["fsync"] * (os.name != "nt")


def test_write_file_replaces_whole_files(tmp_path):
    write_file(tmp_path / "deep" / "x.txt", b"old")
    write_file(tmp_path / "deep" / "x.txt", b"new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.txt"]
    assert (tmp_path / "deep" / "x.txt").read_bytes() == b"new"


class TestExamples:
    CLEAN = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    PERTURBATION = np.linspace(-0.1, 0.1, 18).reshape(2, 3, 3).astype(np.float16)

    def examples(self, start, stop):
        return [Example(i, self.CLEAN + i, None if i % 2 else self.PERTURBATION) for i in range(start, stop)]

    def test_come_back_as_they_were(self, store, folder):
        store.write_examples("pgd", 3, 6, self.examples(3, 6))
        store.write_examples("pgd", 0, 3, self.examples(0, 3))
        # Without the rows that they belong to they are what a killed process left.
        assert load_examples(load_run(folder)) == {}
        write(store, ("pgd", 0, 3))
        write(store, ("pgd", 3, 6))
        found = load_examples(load_run(folder))
        assert list(found) == ["pgd"] and [example.index for example in found["pgd"]] == list(range(6))
        for example in found["pgd"]:
            np.testing.assert_array_equal(example.clean, self.CLEAN + example.index)
            if example.index % 2:
                assert example.perturbation is None
            else:
                np.testing.assert_array_equal(example.perturbation, self.PERTURBATION)
                assert example.perturbation.dtype == np.float16

    def test_none_in_a_run_that_kept_none(self, store, folder):
        assert load_examples(load_run(folder)) == {}

    def test_damaged_and_foreign_files_are_left_out_aloud(self, store, folder, caplog):
        store.write_examples("pgd", 0, 3, self.examples(0, 3))
        file = folder / "examples" / "pgd-000000-000003.parquet"
        file.with_name("fgsm-000000-000003.parquet").write_bytes(file.read_bytes())
        for part in (("pgd", 0, 3), ("fgsm", 0, 3), ("pgd", 3, 6)):
            write(store, part)
        file.with_name("pgd-000003-000006.parquet").write_bytes((folder / "parts" / "pgd-000003-000006.parquet").read_bytes())
        assert list(load_examples(load_run(folder))) == ["pgd"]
        assert "written for another part" in caplog.text
        file.write_bytes(file.read_bytes()[:-9])
        assert load_examples(load_run(folder)) == {}
        assert "is truncated or damaged; its images are left out" in caplog.text

    def test_sizes_must_agree(self, store):
        with pytest.raises(ValueError, match="image 0 is"):
            store.write_examples("pgd", 0, 1, [Example(0, self.CLEAN, self.PERTURBATION[:1])])


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["plan"]["parts"].append(manifest["plan"]["parts"][0]),
        lambda manifest: manifest["plan"]["parts"].pop(),
        lambda manifest: manifest["model"].update(name="lr_resnet50"),
        lambda manifest: manifest.update(seed=1),
        lambda manifest: manifest.update(real_pixels="saved"),
    ],
)
def test_a_manifest_of_an_evaluation_that_was_edited_is_refused(tmp_path, edit):
    manifest = MANIFEST | {"rows_version": 1}
    manifest["fingerprint"] = fingerprint_of(identity_of(manifest))
    with RunStore.create_or_resume(tmp_path, manifest) as store:
        store.write_part(*PARTS[0], chunk(*PARTS[0]), DEVICE)
    assert len(load_run(tmp_path).rows) == 6
    found = json.loads((tmp_path / "manifest.json").read_text())
    # What does not decide the rows may be added to, and is, by every session.
    (tmp_path / "manifest.json").write_text(json.dumps(found | {"class_names": ["a"]}))
    load_run(tmp_path)
    edit(found)
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(StoreError, match="was edited: what it says does not have the fingerprint"):
        load_run(tmp_path)


def test_names_that_are_no_utf8_are_said_before_anything_is_computed(tmp_path):
    with pytest.raises(StoreError, match=r"expected names in UTF-8.*caf\\udce9"):
        RunStore.create_or_resume(tmp_path / "run", {**MANIFEST, "command": ["eval", "caf\udce9"]})
    assert not (tmp_path / "run").exists()
    create(tmp_path / "caf\udce9")
    with pytest.raises(StoreError, match="is not UTF-8"):
        load_run(tmp_path / "caf\udce9")
