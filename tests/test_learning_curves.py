import pytest

from lrrobust.errors import StoreError
from lrrobust.learning_curves import plot_learning_curves

HEADER = "epoch,step,image_size,learning_rate,train_loss,holdout_top1,images_per_s,wall_s\n"


def write(path, rows):
    path.write_text(HEADER + "".join(f"{epoch},5,16,0.1,{loss},{top1},9,9\n" for epoch, loss, top1 in rows))
    return path


def test_a_line_for_each_training(tmp_path):
    one = write(tmp_path / "one.csv", [(1, 4.5, 0.1), (2, 3.5, 0.2)])
    other = write(tmp_path / "other.csv", [(1, 4.0, "nan")])
    written = plot_learning_curves({"lr_resnet50": one, "resnet50": other}, tmp_path / "new" / "curves.v0")
    assert [path.name for path in written] == ["curves.v0.png", "curves.v0.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    first = written[1].read_bytes()
    assert first.count(b"<path") > 10
    plot_learning_curves({"lr_resnet50": one, "resnet50": other}, tmp_path / "again")
    assert (tmp_path / "again.svg").read_bytes() == first
    write(one, [(1, 4.5, 0.1), (2, 3.6, 0.2)])
    plot_learning_curves({"lr_resnet50": one, "resnet50": other}, tmp_path / "again")
    assert (tmp_path / "again.svg").read_bytes() != first


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n"])
def test_what_is_no_log(tmp_path, content):
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    with pytest.raises(StoreError, match=r"log.csv is no log of a training \([^\n]*\): give the log.csv of `lrrobust train`"):
        plot_learning_curves({"x": tmp_path / "log.csv"}, tmp_path / "curves")
