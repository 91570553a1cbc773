import pytest

from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError


@pytest.fixture
def read(tmp_path, pack):
    """read(table's name, content) -> classes of three images."""

    def read(name, content):
        root = pack(tmp_path / "x", {f"val/{i}.png": b"%d" % i for i in range(3)} | {name: content.encode()})
        source = open_dataset(root / name, "abc")
        assert source.name == f"x#{name}" and open_dataset(f"{root}#{name}", "abc").keys == source.keys
        return [source.wnids[i] for i in sorted(range(3), key=source.read_bytes)]

    return read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "0.png 2\n1.png 0\n2.png 1"),
        ("x.txt", "9.png\ta\n./val/0.png\tc\nval\\1.png\ta\nval/2.png\tb\n"),
        ("x.TXT", "0 2\n2 1\n1 0\n\n"),
        ("x.csv", "\ufefflabel,filename\r\n2,0.png\r\n0,1.png\r\n1,2.png\r\n"),
        ("x.csv", 'id;Breed\n0;c\n1;"a"\n2;b\n'),
        ("x.csv", ',image,URL,Class Name,target\nx,0,"h,t",c,a\ny,1,i,a,a\nz,2,j,b,a\n'),
    ],
)
def test_classes_by_name_or_position(read, name, content):
    assert read(name, content) == ["c", "a", "b"]


def test_neurips_2017_counts_from_one_and_the_whole_table_tells_positions(read):
    found = read("images.csv", "ImageId,TrueLabel,TargetClass\n0,1,7\n2,884,7\n1,1000,7\n")
    assert found == ["n01440764", "n15075141", "n04522168"]
    assert read("x.txt", "0.png 0\n1.png 0\n2.png 0\n8.png 1\n9.png 2\n") == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.png,1\n1.png,2\n", "expected each of 0 to 2, found 2 from 1 to 2"),
        ("ImageId,TrueLabel\n0,0\n", "a file and its class"),
        ("file,TargetClass\n0,1\n", "one called 'label'"),
        ("file,label,class\n0,1,b\n", "one called 'label'"),
        (",id,label\n0,1,a\n1,2,b\n2,0,c\n", "one column of files"),
        ("a,0.png\n", "one column of files"),
        ("0.png,1,0\n1.png,0,1\n", "one called 'label'"),
        ("9.png,a\n", "names none of the images"),
        ("0.png,a/b\n", "a file and its class"),
        ("0.png,a\n0.png,b\n", "'0.png' is of class 'a', and 'b' further down; remove one"),
        ("0.png,a\n1.png a\n", "line 2: expected 2 columns"),
        ("", "line 1: expected 2 columns"),
        ('0.png,"a\n', "is no table in UTF-8"),
    ],
)
def test_what_leaves_something_open_is_refused(read, content, message):
    with pytest.raises(DataError, match=message):
        read("x.csv", content)


def test_tables_are_offered_and_images_that_they_lack_passed_over_aloud(tmp_path, pack, container, caplog):
    path = pack(tmp_path / container, {"train/1.png": b"", "test/1.png": b"", "test/2.png": b"", "x.csv": b"id,label\n1,a\n"})
    with pytest.raises(DataError, match=f"a table says their classes, name it, as in '{container}#x.csv'"):
        open_dataset(path)
    with pytest.raises(DataError, match="'1' may be 'test/1.png' or 'train/1.png'"):
        open_dataset(f"{path}#x.csv")
    path = pack(tmp_path / f"one-{container}", {"1.png": b"", "2.png": b"", "x.csv": b"id,label\n1,a\n"})
    assert open_dataset(f"{path}#x.csv").keys == ("a/1.png",) and "passed over 1 images that 'x.csv' lacks" in caplog.text
