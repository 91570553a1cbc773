import yaml

from lrrobust.attacks.suite import load_suite
from lrrobust.console.listings import print_settings


def test_budgets_are_written_as_people_write_them_where_that_is_the_same_number(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: fgsm\neps: [0.0, 1e-9, 1/3, 200/255]\n")
    print_settings(str(path))
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["eps"] == [0.0, 1e-9, "85/255", "200/255"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.yaml").write_text(printed)
    assert load_suite([tmp_path / "again" / "mine.yaml"]) == load_suite([path])


def test_a_suite_is_printed_as_it_is(capsys):
    print_settings("standard")
    suite = yaml.safe_load(capsys.readouterr().out)
    assert suite["kind"] == "suite" and suite["attacks"][:2] == ["fgsm", "pgd"]
