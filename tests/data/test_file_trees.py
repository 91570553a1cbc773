import gzip
import io
import lzma
import os
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lrrobust.data import file_trees
from lrrobust.data.file_trees import CorruptImageError, FolderTree, Spool, open_tree
from lrrobust.errors import DataError

SUFFIXES = (".jpg", ".txt")
OPEN = {".tar": open, ".tar.gz": gzip.open, ".tar.xz": lzma.open}
FILES = {"a/1.jpg": b"one", "a/2.JPG": b"", "b/c/3.jpg": b"three" * 1000, "note.txt": b"text"}


def _open(path, memory_bytes=1_000_000):
    return open_tree(path, SUFFIXES, Spool(memory_bytes))


def test_every_container_gives_the_same_files(tmp_path, container, pack):
    tree = _open(pack(tmp_path / container, {**FILES, "a/skip.csv": b"x", ".hidden.jpg": b"x"}))
    assert tree.names == sorted(FILES)
    assert {name: tree.read(name) for name in tree.names} == FILES
    assert tree.ignored_count == 2


def test_leading_dots_are_dropped_and_mac_leftovers_ignored(tmp_path, pack):
    tree = _open(pack(tmp_path / "x.tar", {"./a/1.jpg": b"1", "__MACOSX/a/1.jpg": b"2", "a/._1.jpg": b"3"}))
    assert (tree.names, tree.ignored_count) == (["a/1.jpg"], 2)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "a//1.jpg"])
def test_unsafe_names_are_passed_over(tmp_path, caplog, pack, suffix, name):
    tree = _open(pack(tmp_path / f"x{suffix}", {name: b"evil", "a/1.jpg": b"good"}))
    assert (tree.names, tree.ignored_count) == (["a/1.jpg"], 1)
    assert sorted(os.listdir(tmp_path)) == [f"x{suffix}"]  # reading extracts nothing
    assert f"passed over 1 files, such as {name!r}, whose names" in caplog.text


def test_a_damaged_entry_of_a_zip_that_takes_in_the_next(tmp_path, pack):
    path = pack(tmp_path / "x.zip", {"a/1.jpg": b"1", "a/2.jpg": b"2", "a/3.jpg": b"3"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 28] += 46 + len("a/2.jpg")  # the length of its name
    path.write_bytes(content)
    with pytest.raises(DataError, match="x.zip is damaged.*2 files in its directory, which says another number"):
        _open(path)


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_passed_over(tmp_path, suffix, kind):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tmp_path / f"x{suffix}", f"w:{suffix[5:]}") as archive:
        archive.addfile(_link("a/link.jpg", str(secret), kind))
        _add(archive, "a/1.jpg", b"good")
    tree = _open(tmp_path / f"x{suffix}")
    assert (tree.names, tree.ignored_count, tree.read("a/1.jpg")) == (["a/1.jpg"], 1, b"good")


def _add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def _zip_link(name):
    link = zipfile.ZipInfo(name)
    link.create_system = 3
    link.external_attr = 0o120777 << 16
    return link


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
def test_links_within_a_tar_are_followed(tmp_path, suffix, caplog):
    with tarfile.open(tmp_path / f"x{suffix}", f"w:{suffix[5:]}") as archive:
        # Before and after what they point to, through each other, and by what is relative to what.
        archive.addfile(_link("./a/early.jpg", "1.jpg", tarfile.SYMTYPE))
        _add(archive, "./a/1.jpg", b"good")
        archive.addfile(_link("./a/hard.jpg", "./a/1.jpg", tarfile.LNKTYPE))
        archive.addfile(_link("./b/soft.jpg", "../a/hard.jpg", tarfile.SYMTYPE))
        archive.addfile(_link("./b/lost.jpg", "../../a/1.jpg", tarfile.SYMTYPE))
        archive.addfile(_link("./b/loop.jpg", "loop.jpg", tarfile.SYMTYPE))
        archive.addfile(_link("./b/note.md", "../a/1.jpg", tarfile.SYMTYPE))
    tree = _open(tmp_path / f"x{suffix}")
    assert tree.names == ["a/1.jpg", "a/early.jpg", "a/hard.jpg", "b/soft.jpg"]
    assert {tree.read(name) for name in tree.names} == {b"good"}
    assert tree.ignored_count == 3
    assert "passed over 2 links, such as './b/lost.jpg'" in caplog.text


def test_what_tar_packed_twice_is_there_once(tmp_path):
    # As `tar cf x.tar a a/1.jpg` writes it.
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        _add(archive, "a/1.jpg", b"good")
        archive.addfile(_link("a/1.jpg", "a/1.jpg", tarfile.LNKTYPE))
    assert _open(tmp_path / "x.tar").names == ["a/1.jpg"]


def test_long_chains_of_links_end(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        _add(archive, "a/0.jpg", b"")
        for number in range(1, 6000):
            archive.addfile(_link(f"a/{number}.jpg", f"{number - 1}.jpg", tarfile.SYMTYPE))
        archive.addfile(_link("b", "a", tarfile.SYMTYPE))
    started = time.monotonic()
    tree = _open(tmp_path / "x.tar.gz")
    assert time.monotonic() - started < 20 and len(tree.names) + tree.ignored_count == 6001
    assert "such as 'b'" in caplog.text and len(tree.names) == 6000


def test_links_within_a_zip_are_followed_and_no_others(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(_zip_link("b/link.jpg"), "../a/1.jpg")
        archive.writestr("a/1.jpg", b"good")
        archive.writestr(_zip_link("b/odd.jpg"), b"../caf\xe9")
        archive.writestr(_zip_link("b/out.jpg"), "/etc/passwd")
    tree = _open(tmp_path / "x.zip")
    assert tree.ignored_count == 2
    assert (tree.names, tree.read("b/link.jpg")) == (["a/1.jpg", "b/link.jpg"], b"good")


@pytest.mark.parametrize(("system", "names"), [(0, ["a/1.jpg"]), (3, ["a\\1.jpg"])])
def test_a_zip_of_windows_may_separate_folders_with_backslashes(tmp_path, system, names):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a\\", "a\\1.jpg", "..\\2.jpg") if system == 0 else ("a\\1.jpg",):
            member = zipfile.ZipInfo(name)
            member.create_system = system
            archive.writestr(member, b"")
    tree = _open(tmp_path / "x.zip")
    assert tree.names == names and [tree.read(name) for name in names] == [b""]


def test_an_empty_name_in_a_zip_is_passed_over(tmp_path, pack):
    path = pack(tmp_path / "x.zip", {"#.jpg": b"nameless", "a/1.jpg": b"good"})
    # zipfile writes no such name; it cuts one at its first zero byte when it reads.
    path.write_bytes(path.read_bytes().replace(b"#.jpg", b"\0.jpg"))
    tree = _open(path)
    assert (tree.names, tree.ignored_count) == (["a/1.jpg"], 1)


def test_links_in_a_folder_are_followed_and_loops_end(tmp_path, pack):
    pack(tmp_path / "elsewhere", {"1.jpg": b"one"})
    root = pack(tmp_path / "root", {"b/2.jpg": b"two"})
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    tree = _open(root)
    assert {name: tree.read(name) for name in tree.names} == {"a/1.jpg": b"one", "b/2.jpg": b"two", "b/3.jpg": b"one"}
    (root / "b" / "up").symlink_to(root)
    assert len(_open(root).names) < 20


def test_size_limit_holds_for_every_container(tmp_path, container, pack, monkeypatch):
    monkeypatch.setattr(file_trees, "MAX_MEMBER_BYTES", 100)
    tree = _open(pack(tmp_path / container, {"a/big.jpg": b"x" * 101, "a/fits.jpg": b"x" * 100}))
    assert len(tree.read("a/fits.jpg")) == 100
    with pytest.raises(CorruptImageError, match=r"'a/big.jpg' has 101 bytes; at most 100"):
        tree.read("a/big.jpg")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_truncated_archive_is_refused(tmp_path, pack, suffix):
    path = pack(tmp_path / f"x{suffix}", {f"a/{i}.jpg": os.urandom(2000) for i in range(20)})
    path.write_bytes(path.read_bytes()[:25_000])
    with pytest.raises(DataError, match=r"is damaged, cut short or no .* archive .*anew"):
        _open(path)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz"])
def test_damage_behind_the_last_file_is_noticed(tmp_path, pack, suffix):
    path = pack(tmp_path / f"x{suffix}", {"a/1.jpg": b"one"})
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match="cut short"):
        _open(path)


def _rewrite_tar(path, suffix, change):
    with OPEN[suffix](path, "rb") as file:
        raw = file.read()
    with OPEN[suffix](path, "wb") as file:
        file.write(change(raw))
    return path


@pytest.fixture
def four(tmp_path, pack, request):
    """A tar of four files, of 1024 bytes each; compressed as its suffix says."""
    suffix = request.getfixturevalue("suffix")
    return pack(tmp_path / f"x{suffix}", {f"a/{i}.jpg": b"one" for i in range(4)})


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize(
    "change", [lambda raw: raw[:2048] + b"?" + raw[2049:], lambda raw: raw[:2100]], ids=["overwritten", "cut"]
)
def test_a_damaged_header_is_not_the_end_of_a_tar(four, suffix, change):
    with pytest.raises(DataError, match="is damaged, cut short"):
        _open(_rewrite_tar(four, suffix, change))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_without_its_end_is_read_aloud(four, suffix, caplog):
    assert len(_open(four).names) == 4 and not caplog.text
    assert len(_open(_rewrite_tar(four, suffix, lambda raw: raw[:2048])).names) == 2
    assert "ends without the mark" in caplog.text


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("change", "count"),
    [(lambda raw: raw + raw.replace(b"a/", b"b/"), 4), (lambda raw: raw[:2048] + bytes(1024) + raw[3072:], 2)],
    ids=["joined", "hole"],
)
def test_what_lies_behind_the_end_of_a_tar_is_told_of(four, suffix, change, count, caplog):
    assert len(_open(_rewrite_tar(four, suffix, change)).names) == count
    assert "goes on behind the mark of its end" in caplog.text


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("content", [b"", b"not an archive at all" * 100])
def test_other_content_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut short or no"):
        _open(path)


def test_unknown_kind_names_the_known_ones(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"x.rar is neither a folder nor an archive; .*\.zip, \.tar, \.tar\.gz"):
        _open(tmp_path / "x.rar")


def test_a_zip_of_a_later_version_is_said_to_be_one(tmp_path, pack):
    raw = pack(tmp_path / "x.zip", {"a/1.jpg": b"good"}).read_bytes()
    directory = raw.index(b"PK\1\2")
    # "Version needed to extract": 9.9.
    (tmp_path / "x.zip").write_bytes(raw[: directory + 6] + b"\x63" + raw[directory + 7 :])
    with pytest.raises(DataError, match="cannot unpack this zip .*9.9.*; pack it anew"):
        _open(tmp_path / "x.zip")


def test_damaged_zip_member_is_corrupt(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"the content of the file")
    raw = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(raw.replace(b"the content", b"THE content", 1))
    with pytest.raises(CorruptImageError, match="'a/1.jpg' is damaged"):
        _open(tmp_path / "x.zip").read("a/1.jpg")


def test_file_twice_in_an_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"old", b"new"):
            _add(archive, "a/1.jpg", content)
    with pytest.raises(DataError, match="holds 'a/1.jpg' twice"):
        _open(tmp_path / "x.tar")


def test_name_that_is_not_text_is_refused(tmp_path, pack):
    with pytest.raises(DataError, match="not UTF-8"):
        _open(pack(tmp_path / "x.tar", {"a/\udcff.jpg": b"x"}))


@pytest.mark.parametrize("name", ["x.tar", "x"])
def test_vanished_file_is_named_and_is_not_corruption(tmp_path, pack, name):
    path = pack(tmp_path / name, {"a/1.jpg": b"one"})
    tree = _open(path)
    (path / "a/1.jpg" if path.is_dir() else path).unlink()
    with pytest.raises(DataError, match="cannot read .*No such file") as caught:
        tree.read("a/1.jpg")
    assert not isinstance(caught.value, CorruptImageError)


def test_tar_cut_after_it_was_listed_is_corrupt(tmp_path, pack):
    path = pack(tmp_path / "x.tar", {"a/1.jpg": b"one" * 1000})
    tree = _open(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptImageError, match="cut short"):
        tree.read("a/1.jpg")


@pytest.mark.parametrize("memory_bytes", [10, 1_000_000])
def test_spool_gives_back_what_went_in(memory_bytes):
    spool = Spool(memory_bytes)
    contents = [bytes([i]) * i for i in range(50)]
    spans = []
    for content in contents:
        spans.append(spool.append(content))
        assert spool.read(spans[0]) == contents[0]  # reading in between moves no later write
    assert [spool.read(span) for span in spans] == contents


def test_spool_lets_one_thread_at_a_time_move_its_file():
    class SlowFile(io.BytesIO):
        def seek(self, *where):
            super().seek(*where)
            time.sleep(0.001)  # long enough for another thread to seek elsewhere

    spool = Spool()
    spool._file = SlowFile()
    spans = [spool.append(bytes([i]) * 3) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(spool.read, spans)) == [bytes([i]) * 3 for i in range(40)]


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_reading_from_threads(tmp_path, pack, suffix):
    files = {f"a/{i}.jpg": bytes([i]) * (i * 300) for i in range(100)}
    tree = _open(pack(tmp_path / f"x{suffix}", files), memory_bytes=100)
    names = list(files) * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tree.read, names)) == [files[name] for name in names]


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_header_that_would_fill_memory_is_refused(tmp_path, suffix, kind):
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 1_000_001
    with OPEN[suffix](tmp_path / f"x{suffix}", "wb") as archive:
        archive.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1_000_448))
    with pytest.raises(DataError, match="a header of 1000001 bytes, at most 1000000 are read"):
        _open(tmp_path / f"x{suffix}")


def test_bomb_of_many_files_is_refused(tmp_path, pack, monkeypatch):
    monkeypatch.setattr("lrrobust.data.file_trees.MAX_UNPACKED_BYTES", 10_000)
    files = {f"a/{index}.jpg": bytes(100_000) for index in range(100)}
    path = pack(tmp_path / "x.tar.xz", files)
    assert path.stat().st_size * 100 + 10_000 < 10_000_000
    with pytest.raises(DataError, match="unpacks to more than"):
        _open(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match="neither a folder nor a file"):
        _open(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
@pytest.mark.parametrize("kind", ["old", "pax"])
def test_maps_of_sparse_files_that_are_none_are_damage(tmp_path, suffix, kind):
    member = tarfile.TarInfo("a/1.jpg")
    if kind == "old":
        member.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[482] = 1  # its map goes on in the next block
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    else:
        member.size = 512
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
        header = member.tobuf(tarfile.PAX_FORMAT) + b"x" * 512
    with OPEN[suffix](tmp_path / f"x{suffix}", "wb") as archive:
        archive.write(header)
    with pytest.raises(DataError, match="is damaged, cut short or no tar archive"):
        _open(tmp_path / f"x{suffix}")


def test_links_to_nowhere_or_themselves_and_pipes_in_a_folder_are_passed_over_aloud(tmp_path, pack, caplog):
    folder = pack(tmp_path / "root", {"a/1.jpg": b"1"}) / "a"
    for name, target in (("2.jpg", "gone.jpg"), ("4.jpg", "4.jpg"), ("loop", "loop"), ("notes.txt", "gone.txt")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "3.jpg")
    tree = FolderTree(tmp_path / "root", (".jpg",))
    assert tree.names == ["a/1.jpg"] and tree.ignored_count == 5
    assert "passed over 3 images that are no files, such as 'a/2.jpg'" in caplog.text
