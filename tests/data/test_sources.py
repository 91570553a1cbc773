import numpy as np
import pytest

from lrrobust.data.file_trees import CorruptImageError
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError


def _content(source):
    return {key: (wnid, source.read_bytes(i)) for i, (key, wnid) in enumerate(zip(source.keys, source.wnids))}


@pytest.fixture
def expected(pets):
    return {key: (key.split("/")[0], content) for key, content in pets.items()}


@pytest.mark.parametrize("prefix", ["", "train/", "any/where/"])
def test_class_folders_in_every_container(tmp_path, container, pack, pets, expected, prefix):
    path = pack(tmp_path / container, {prefix + key: content for key, content in pets.items()})
    source = open_dataset(path)
    assert _content(source) == expected
    assert list(source.keys) == sorted(pets)
    assert source.name == container


def test_a_local_folder_called_photos_is_not_taken_for_the_data_set(tmp_path, monkeypatch, caplog, pack, pets, expected):
    monkeypatch.setattr("lrrobust.data.sources.open_photos", lambda: "the 500")
    monkeypatch.chdir(tmp_path)
    assert open_dataset("photos") == "the 500" and not caplog.records
    pack(tmp_path / "photos", pets)
    assert open_dataset("photos") == "the 500"
    assert "not what lies in ./photos: write ./photos to read that" in caplog.text
    assert _content(open_dataset("./photos")) == expected


def test_images_decode(tmp_path, pack, pets):
    source = open_dataset(pack(tmp_path / "pets.zip", pets))
    assert len(source) == 5
    image = source.read(source.keys.index("cat/3.png"))
    pixels = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_images_subfolder_as_in_tiny_imagenet(tmp_path, container, pack, pets, expected):
    files = {key.replace("/", "/images/"): content for key, content in pets.items()}
    files["cat/cat_boxes.txt"] = b"1.jpg\t0\t0\t7\t7\n"
    source = open_dataset(pack(tmp_path / container, files))
    assert _content(source) == expected
    assert source.ignored_count == 1


def test_unsorted_validation_images_called_after_their_classes(tmp_path, container, pack, pets):
    """As in the archives of ImageNet on the Hugging Face hub."""
    names = {f"ILSVRC2012_val_0000000{number}_n0000000{number % 2}.JPEG": pets[key] for number, key in enumerate(sorted(pets))}
    source = open_dataset(pack(tmp_path / container, names))
    assert _content(source) == {f"{name[-14:-5]}/{name}": (name[-14:-5], content) for name, content in names.items()}
    # In class folders these say what they are of.
    (tmp_path / "sorted").mkdir()
    files = {f"{'ant' if '_n00000000' in name else 'bee'}/{name}": content for name, content in names.items()}
    assert set(open_dataset(pack(tmp_path / "sorted" / container, files)).wnids) == {"ant", "bee"}


def _tiny(pets):
    """The layout of the public zip, with the pets as validation images."""
    root = "tiny-imagenet-200"
    files = {f"{root}/wnids.txt": b"dog\ncat\n", f"{root}/test/images/test_0.JPEG": pets["cat/1.jpg"]}
    files[f"{root}/train/cat/images/cat_0.JPEG"] = pets["cat/2.jpg"]
    lines = []
    for key, content in pets.items():
        wnid, file = key.split("/")
        files[f"{root}/val/images/{wnid}_{file}"] = content
        lines.append(f"{wnid}_{file}\t{wnid}\t0\t0\t7\t7\n")
    files[f"{root}/val/val_annotations.txt"] = "".join(lines).encode()
    return files


def test_tiny_imagenet_chooses_val_and_says_so(tmp_path, container, pack, pets):
    source = open_dataset(pack(tmp_path / container, _tiny(pets)))
    assert source.name == f"{container}#val"
    assert {key: content for key, (_, content) in _content(source).items()} == {
        f"{key.split('/')[0]}/{key.replace('/', '_')}": content for key, content in pets.items()
    }
    assert source.ignored_count == 2  # wnids.txt and the unlabelled test image


def test_fragment_chooses_the_split(tmp_path, container, pack, pets):
    path = pack(tmp_path / container, _tiny(pets))
    source = open_dataset(f"{path}#train")
    assert (source.name, source.keys, source.wnids) == (f"{container}#train", ("cat/cat_0.JPEG",), ("cat",))
    assert open_dataset(f"{path}#val").keys == open_dataset(path).keys


def test_unknown_split_lists_what_is_there(tmp_path, pack, pets):
    path = pack(tmp_path / "tiny.zip", _tiny(pets))
    with pytest.raises(DataError, match=r"in a folder 'test', found them in .*/train', .*/val'"):
        open_dataset(f"{path}#test")


def test_imagenet_root_chooses_val(tmp_path, pack, pets):
    files = {f"train/{key}": pets["dog/2.JPEG"] for key in ["cat/9.jpg", "dog/8.jpg"]}
    root = pack(tmp_path / "imagenet", {**files, **{f"val/{key}": content for key, content in pets.items()}})
    assert open_dataset(root).keys == tuple(sorted(pets))
    assert open_dataset(root).name == "imagenet#val"
    assert open_dataset(f"{root}#train").keys == ("cat/9.jpg", "dog/8.jpg")


@pytest.mark.parametrize("name", ["train", "test", "val", "validation", "images"])
@pytest.mark.parametrize("above", ["", "any/"])
def test_a_class_may_be_called_as_a_split_is(tmp_path, container, pack, encode, name, above):
    files = {f"{above}{wnid}/{wnid}.jpg": encode(0) for wnid in ("apple", "bus", name)}
    source = open_dataset(pack(tmp_path / container, files))
    assert sorted(source.wnids) == sorted(["apple", "bus", name]) and source.ignored_count == 0


def test_annotated_images_stay_annotated_beside_other_folders(tmp_path, container, pack, pets, encode):
    files = _tiny(pets) | {"tiny-imagenet-200/val/preview/a.png": encode(3, format="PNG")}
    source = open_dataset(pack(tmp_path / container, files))
    assert sorted(source.wnids) == ["cat", "cat", "cat", "dog", "dog", "preview"]


def test_images_of_imagenet_sorted_into_classes_of_other_names(tmp_path, container, pack, encode):
    files = {f"{number % 2}/ILSVRC2012_val_{number:08d}.JPEG": encode(number) for number in range(1, 5)}
    source = open_dataset(pack(tmp_path / container, files))
    assert sorted(source.wnids) == ["0", "0", "1", "1"]


def test_class_folders_in_several_places_are_ambiguous(tmp_path, pack, pets):
    root = pack(tmp_path / "r", {f"{part}/{key}": image for part in ("x", "y") for key, image in pets.items()})
    with pytest.raises(DataError, match=r"in one place, found them in 'x', 'y'; .*'r#x'"):
        open_dataset(root)
    assert len(open_dataset(f"{root}#y")) == 5


@pytest.mark.parametrize("lone", ["part-1.zip", "part-3.zip"])
def test_archives_of_different_splits_are_not_mixed(tmp_path, pack, pets, lone):
    part = {f"train/{key}": pets[key] for key in pets if key.startswith("cat")}
    pack(tmp_path / "part-2.zip", {**part, **{f"val/{key}": pets[key] for key in pets}})
    pack(tmp_path / lone, {f"train/{key}": pets[key] for key in pets if key.startswith("dog")})
    with pytest.raises(DataError, match=f"of 'val', and {lone} those of 'train'; name the one to read, as in '.*#train'"):
        open_dataset(f"{tmp_path}/part-*.zip")
    assert open_dataset(f"{tmp_path}/part-*.zip#train").keys == tuple(sorted(pets))


@pytest.mark.parametrize("names", [("train-0.parquet", "validation-0.parquet"), ("x_val.tar", "x_train.tar"), ("val", "test")])
def test_patterns_that_take_in_several_splits_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"takes in t.* and v.*: narrow the pattern"):
        open_dataset(f"{tmp_path}/*")


def test_folders_too_deep_are_passed_over_aloud(tmp_path, pack, caplog):
    files = {f"1/2/3/4/{folder}/1.jpg": b"" for folder in ("cat", "dog/images/x")}
    source = open_dataset(pack(tmp_path, files))
    assert source.wnids == ("cat",) and "passed over 1 folders as too deep, such as '1/2/3/4/dog/images/'" in caplog.text


def test_several_archives_by_pattern_and_by_comma(tmp_path, pack, pets):
    names = sorted(pets)
    for i, part in enumerate([names[:2], names[2:3], names[3:]]):
        pack(tmp_path / f"train-{i}.tar.xz", {f"train/{name}": pets[name] for name in part})
    by_pattern = open_dataset(f"{tmp_path}/train-*.tar.xz")
    by_comma = open_dataset(",".join(f"{tmp_path}/train-{i}.tar.xz" for i in (2, 0, 1)))
    assert _content(by_pattern) == _content(by_comma)
    assert list(by_pattern.keys) == list(by_comma.keys) == names
    assert by_pattern.name == "train-*.tar.xz"
    assert by_comma.name == "train-2.tar.xz,train-0.tar.xz,train-1.tar.xz"


def test_numbers_are_positions_in_the_models_list_and_said_to_be(tmp_path, container, pack, encode, caplog):
    """As in ImageNet-V2."""
    names = [f"n{number:08d}" for number in range(12)]
    source = open_dataset(pack(tmp_path / container, {f"{i}/{i % 5}.jpg": encode(i) for i in range(12)}), names, tuple(names))
    assert _content(source) == {f"{name}/{i % 5}.jpg": (name, encode(i)) for i, name in enumerate(names)}
    assert "taken for positions in the class list of the model, where 0 is 'n00000000', 11 is 'n0000001" in caplog.text
    named = {f"{name}/{i % 5}.jpg": encode(i) for i, name in enumerate(names)}
    assert open_dataset(pack(tmp_path / f"named-{container}", named)).keys == source.keys


@pytest.mark.parametrize(
    ("folders", "class_lists", "message"),
    [
        ("123", ["abc"], "each of 0 to 2, found 3 from 1 to 3; take the whole data set, or call classes by"),
        ("02", ["abc"], "each of 0 to 2, found 2 from 0 to 2"),
        ("0123", ["abc"], "each of 0 to 2, found 4 from 0 to 3"),
        (["0", "1", "01"], ["abc"], "found 3 from 0 to 1"),
        ("012", ["abc", "acb"], "the models count theirs differently"),
        ("01", [["n00000002", "n00000001"]], "WordNet ids in the order of the model or in theirs"),
    ],
)
def test_numbers_that_may_count_something_else_are_refused(tmp_path, pack, encode, folders, class_lists, message):
    path = pack(tmp_path / "x", {f"{name}/1.jpg": encode() for name in folders})
    with pytest.raises(DataError, match=f"x: the classes are numbers.*{message}"):
        open_dataset(path, *class_lists)
    # By name, where a model has such names; as they are, where nobody says what they are for.
    for given in ([*class_lists, folders], []):
        assert set(open_dataset(path, *given).wnids) == set(folders)


def test_path_that_holds_special_characters_is_taken_literally(tmp_path, pack, pets):
    for name in ["a,b", "a#val", "a[1]"]:
        assert len(open_dataset(str(pack(tmp_path / name, pets)))) == 5


def test_shards_of_webdataset(tmp_path, container, pack, pets, encode):
    shard = {f"{i}.{end}": content for i in range(3) for end, content in (("jpg", encode(i)), ("cls", b"%d\n" % (2 - i)))}
    source = open_dataset(pack(tmp_path / container, shard), "abc")
    assert _content(source) == {f"{'cba'[i]}/{i}.jpg": ("cba"[i], encode(i)) for i in range(3)}
    # Of ImageNet, by what the images were called.
    called = {f"{i}.json": b'{"filename": "n0000000%d/%d.JPEG", "label": %d}' % (i + 5, i, 2 - i) for i in range(3)}
    named = {f"n0000000{i + 5}_{name}": shard[name] for name in shard for i in (int(name[0]),)}
    for number, files in enumerate((shard | called, named)):
        source = open_dataset(pack(tmp_path / f"{number}-{container}", files))
        assert source.wnids == ("n00000005", "n00000006", "n00000007") and source.read_bytes(2) == encode(2)
    # Not where both contradict each other; class folders say more than either.
    files = shard | called | {"0.cls": b"1"}
    assert sorted(open_dataset(pack(tmp_path / f"other-{container}", files)).wnids) == ["0", "1", "1"]
    files = pets | {"cat/1.cls": b"7"}
    assert set(open_dataset(pack(tmp_path / f"sorted-{container}", files)).wnids) == {"cat", "dog"}


@pytest.mark.parametrize("content", [b"", b" ", b"a/b", b"\xff\n\x00"])
def test_class_files_that_hold_no_class_are_refused(tmp_path, pack, encode, content):
    with pytest.raises(DataError, match="expected the number or name of a class in '1.cls', found"):
        open_dataset(pack(tmp_path / "x.tar", {"1.jpg": encode(), "1.cls": content}))


def test_loose_training_images_of_imagenet_are_called_after_their_classes(tmp_path, container, pack, encode):
    """As in the tars that ILSVRC2012_img_train.tar unpacks to, and in those of the Hugging Face hub."""
    files = {"n00000001_12.JPEG": encode(0), "n00000002_7_n00000002.JPEG": encode(1)}
    for above in ("", "any/train/"):
        (tmp_path / f"x{above[-2:-1]}").mkdir()
        source = open_dataset(pack(tmp_path / f"x{above[-2:-1]}" / container, {above + name: files[name] for name in files}))
        assert _content(source) == {f"{name[:9]}/{name}": (name[:9], content) for name, content in files.items()}
    # In folders they are of these, and names that contradict themselves say nothing.
    files = {f"dog/{name}": content for name, content in files.items()} | {"n00000001_7_n00000002.JPEG": encode(1)}
    assert set(open_dataset(pack(tmp_path / f"dog-{container}", files)).wnids) == {"dog"}


def test_same_key_twice_is_refused(tmp_path, pack, pets):
    one, two = pack(tmp_path / "1.zip", pets), pack(tmp_path / "2.tar", {"cat/2.jpg": b"other"})
    with pytest.raises(DataError, match=r"1.zip,2.tar: two images are called 'cat/2.jpg'"):
        open_dataset(f"{one},{two}")


def test_files_that_are_no_images_are_counted(tmp_path, pack, pets):
    extra = {"README.md": b"x", "cat/notes.csv": b"x", "loose.jpg": b"x", "labels.txt": b"x"}
    assert open_dataset(pack(tmp_path / "pets", {**pets, **extra})).ignored_count == 4


def test_images_of_formats_that_are_not_read_are_counted_aloud(tmp_path, container, pack, pets, expected, caplog):
    passed_over = ["cat/4.gif", "cat/5.TIFF", "dog/3.gif", "dog/4"]
    elsewhere = ["cat/.hidden.gif", "loose.gif", "README.md", "cat/notes.txt"]
    extra = dict.fromkeys(passed_over + elsewhere, b"x")
    source = open_dataset(pack(tmp_path / container, {**pets, **extra}))
    assert _content(source) == expected
    (said,) = caplog.messages
    assert f"{container}: passed over 4 files in class folders (2 .gif, 1 without a suffix, 1 .tiff)" in said
    assert "convert them to PNG" in said


def test_only_the_split_that_is_read_is_looked_at_for_other_formats(tmp_path, pack, pets, caplog):
    files = {f"{split}/{key}": content for split in ("train", "val") for key, content in pets.items()}
    path = pack(tmp_path / "pets", {**files, "train/cat/4.gif": b"x", "valid/cat/5.gif": b"x"})
    open_dataset(path)
    assert not caplog.messages
    open_dataset(f"{path}#train")
    assert "1 files in class folders (1 .gif)" in caplog.text


@pytest.mark.parametrize("unlabelled", ["val/1.jpg", "val/images/1.jpg", "test/1.jpg"])
def test_a_lone_split_is_named_and_images_beside_it_are_passed_over_aloud(tmp_path, container, pack, pets, caplog, unlabelled):
    path = pack(tmp_path / container, {**{f"any/train/{key}": pets[key] for key in pets}, f"any/{unlabelled}": b"one"})
    source = open_dataset(path)
    assert (source.name, source.keys) == (f"{container}#train", tuple(sorted(pets)))
    assert f"passed over 1 images outside of class folders, such as 'any/{unlabelled}'" in caplog.text


def test_images_that_annotations_lack_and_loose_ones_are_passed_over_aloud(tmp_path, pack, pets, caplog):
    files = _tiny(pets)
    open_dataset(pack(tmp_path / "whole", files))
    assert not caplog.text
    files["tiny-imagenet-200/val/images/other.JPEG"] = b"one"
    open_dataset(pack(tmp_path / "more", files))
    assert "passed over 1 images outside of class folders, such as 'tiny-imagenet-200/val/images/other.JPEG'" in caplog.text
    open_dataset(pack(tmp_path / "pets", {**pets, "logo.png": b"one"}))
    assert "passed over 1 images outside of class folders, such as 'logo.png'" in caplog.text


def test_a_link_to_a_data_set_is_that_data_set(tmp_path, container, pack, pets, expected):
    (tmp_path / "there").mkdir()
    (tmp_path / container).symlink_to(pack(tmp_path / "there" / container, pets))
    source = open_dataset(tmp_path / container)
    assert _content(source) == expected and source.name == container


def test_missing_path_offers_near_names(tmp_path, pack, pets):
    pack(tmp_path / "animals.zip", pets)
    with pytest.raises(DataError, match=r"there is no such file or folder; did you mean animals.zip\?"):
        open_dataset(tmp_path / "animal.zip")
    with pytest.raises(DataError, match="give a folder, a zip, a tar, or 'photos'"):
        open_dataset(tmp_path / "none" / "x")
    with pytest.raises(DataError, match=r"did you mean photos\?"):
        open_dataset("photo")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing-*.zip", "no file or folder matches"),
        ("a.zip,,b.zip", "found an empty one"),
        ("", "found an empty one"),
        ("#val", "PATH#SPLIT"),
    ],
)
def test_unusable_spec_is_refused(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found no image$"),
        ({"cat/notes.txt": b"x"}, "found no image$"),
        ({"1.jpg": b"x", "val/2.jpg": b"x", "images/3.jpg": b"x"}, "found images outside of any class folder$"),
        ({"part-1.tar.xz": b"x"}, r"found no image; to read archives in it, .*'folder/train-\*.tar.xz'"),
        ({"cat/1.jpg": b"x", "dog/poodle/2.jpg": b"x"}, r"found them in '.', 'dog'; .*, as in 'data#dog'"),
    ],
)
def test_folder_without_labelled_images_is_refused(tmp_path, pack, files, message):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=message):
        open_dataset(pack(tmp_path / "data", files))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.xz"])
def test_empty_archive_is_refused(tmp_path, pack, suffix):
    with pytest.raises(DataError, match="found no image"):
        open_dataset(pack(tmp_path / f"x.{suffix}", {}))


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_an_archive_of_archives_is_said_to_be_one(tmp_path, pack, suffix):
    path = pack(tmp_path / f"x.{suffix}", {"n01440764.tar": b"x"})
    with pytest.raises(DataError, match="found no image; archives within it are not read: unpack it first$"):
        open_dataset(path)


@pytest.mark.parametrize("above", ["", "./", "train/"])
def test_a_tar_of_a_tar_for_each_class(tmp_path, pack, pets, expected, caplog, above):
    """As ILSVRC2012_img_train.tar."""
    tars = {}
    for wnid in ("cat", "dog"):
        files = {key[4:]: content for key, content in pets.items() if key.startswith(wnid)} | {"notes.md": b"x"}
        tars[f"{above}{wnid}.tar"] = pack(tmp_path / "one.tar", files).read_bytes()
    source = open_dataset(pack(tmp_path / "train.tar", tars))
    assert _content(source) == expected and source.is_fork_safe and source.ignored_count == 2
    assert len(caplog.messages) == 1 and "passed over 2 files in class folders (2 .md)" in caplog.text
    # Beside images they are passed over as ever, and tars in them are not opened.
    assert len(open_dataset(pack(tmp_path / "more.tar", tars | {"emu/1.jpg": b"x"}))) == 1
    with pytest.raises(DataError, match="2 .tar; archives within it are not read"):
        open_dataset(pack(tmp_path / "deep.tar", {"a.tar": (tmp_path / "train.tar").read_bytes()}))


@pytest.mark.parametrize("cut", [0, 700, -1])
def test_damage_in_a_tar_of_tars_is_named(tmp_path, pack, pets, cut, caplog):
    whole = pack(tmp_path / "one.tar", {"1.jpg": pets["cat/1.jpg"], "2.jpg": pets["cat/2.jpg"]}).read_bytes()
    if cut < 0:  # The mark of its end is missing: what follows is not of this class.
        whole = whole.rstrip(b"\0").ljust(-(-len(whole.rstrip(b"\0")) // 512) * 512, b"\0")
        source = open_dataset(pack(tmp_path / "train.tar", {"cat.tar": whole, "dog.tar": whole}))
        assert source.keys == ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
        assert "train.tar/cat ends without the mark of its end" in caplog.text
        return
    with pytest.raises(DataError, match="train.tar/dog.tar is damaged, cut short or no tar archive"):
        open_dataset(pack(tmp_path / "train.tar", {"dog.tar": whole[:cut]}))


def test_file_that_is_no_archive_is_refused(tmp_path, encode):
    (tmp_path / "1.jpg").write_bytes(encode())
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        open_dataset(tmp_path / "1.jpg")


def test_corrupt_image_is_named_when_read(tmp_path, pack, pets):
    source = open_dataset(pack(tmp_path / "pets.zip", {**pets, "cat/2.jpg": pets["cat/2.jpg"][:200]}))
    source.read(0)
    with pytest.raises(CorruptImageError, match=r"pets.zip: image 'cat/2.jpg' is damaged, cut short"):
        source.read(1)
