"""Who may import whom, read from the source; and what an answer to `--help` costs."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from own_process import run_process

import lrrobust

PACKAGE = Path(lrrobust.__file__).parent

#: Part of the package -> parts that it may import anywhere. `lrrobust` is the package's own head (the version).
MAY_IMPORT = {
    "__main__": "cli",
    # A default of the command line stands where it is used: in the plan of chunks, which imports nothing.
    "cli": (
        "lrrobust attacks.suite console run train processes check report transfer_report page results verdict export "
        "verify errors evaluation.chunks exits interrupts process_settings"
    ),
    "exits": "errors interrupts out_of_memory",
    "console": "formatting report results diagnostics.table diagnostics.records",
    "check": "norm formatting report.notices results stats mistakes errors",
    "testing": "in_memory models evaluation.chunks",
    "in_memory": (
        "data.tensor_images attacks evaluation diagnostics models planned_evaluation processes report.summary "
        "report.summary_table report.notices results run frozen errors"
    ),
    "run": "data attacks evaluation models planned_evaluation processes mistakes errors",
    "planned_evaluation": "data.class_lists attacks evaluation diagnostics models results provenance errors",
    "train": "data training models processes provenance config_file errors",
    "processes": "evaluation.task_queue mistakes errors",
    "verify": "planned_evaluation evaluation export data.class_lists threat determinism frozen errors",
    "export": "results norm errors",
    # Neither models nor data: what is evaluated is given to it.
    "evaluation": "attacks threat out_of_memory results errors determinism frozen",
    "diagnostics": (
        "attacks evaluation out_of_memory threat norm results stats formatting tables mistakes errors determinism frozen"
    ),
    "bench": (
        "attacks crosscheck data determinism evaluation models ops out_of_memory results tables errors interrupts "
        "process_settings"
    ),
    # Of a run what it left; the model and the images are given to it.
    "crosscheck": "attacks evaluation results stats threat eps errors determinism frozen torchvision_import",
    # Of the attacks how a step goes and stays in the ball: training judges nothing. Of the results who may write to a folder.
    "training": (
        "models tensor_file norm out_of_memory data attacks.ball results.folder_lock results.files eps determinism frozen "
        "interrupts provenance config_file errors"
    ),
    # Of the verdict its records alone: what is shown is given to it.
    "page": (
        "lrrobust formatting report transfer transfer_report tables plots results stats verdict.records diagnostics.table"
    ),
    "report": (
        "formatting eps norm results stats plots tables diagnostics.table process_settings provenance interrupts errors"
    ),
    "transfer": "results stats",
    "transfer_report": "transfer formatting tables results",
    "tables": "",
    # Of the report only how it names things.
    "verdict": (
        "results report.naming formatting report.notices transfer transfer_report stats diagnostics.records "
        "diagnostics.decision provenance config_file eps norm errors"
    ),
    "learning_curves": "plots results errors",
    "plots": "stats",
    "stats": "",
    "results": "interrupts mistakes errors",
    "models": (
        "ops tensor_file loaded_code out_of_memory gradient_rules user_file determinism results.files errors torchvision_import"
    ),
    "attacks": "threat norm config_file mistakes eps errors frozen gradient_rules loaded_code user_file",
    "data": "errors",
    "ops": "gradient_rules errors",
    "threat": "norm",
    "provenance": "lrrobust process_settings",
    "errors": "",
    "formatting": "",
    "config_file": "mistakes errors",
    "mistakes": "",
    "eps": "",
    "norm": "",
    "frozen": "",
    "determinism": "",
    "out_of_memory": "",
    "gradient_rules": "",
    "half_precision": "",
    "loaded_code": "",
    "user_file": "determinism torchvision_import errors",
    "tensor_file": "",
    "torchvision_import": "",
    "interrupts": "",
    "process_settings": "",
    "lrrobust": "",
    # What a user's own file may use.
    "examples": "models data errors",
}
#: Allowed inside functions only, where they cost nothing until they are called.
MAY_IMPORT_LATE = {
    "cli": "bench crosscheck learning_curves training.ranks out_of_memory",
    "lrrobust": "in_memory",
    "in_memory": "console",
    "console": "bench check models attacks provenance half_precision",
}
#: Packages that one file alone may import.
ONLY_IN = {
    "torchattacks": "crosscheck/with_torchattacks.py",
    "foolbox": "crosscheck/with_foolbox.py",
    "adv_lib": "crosscheck/with_adv_lib.py",
    "numba": "ops/_cpu.py",
    "llvmlite": "ops/_cpu.py",
    "triton": "ops/_triton.py",
    "timm": "models/registry.py",
}


class Import(NamedTuple):
    """An import statement: dotted name of what is imported, and where it stands."""

    module: str
    line: int
    is_late: bool
    is_for_types: bool


def find_imports(tree: ast.AST, is_late: bool = False, is_for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        late = is_late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = is_for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, late, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports of this package are absolute"
            for name in node.names:
                yield Import(f"{node.module}.{name.name}", node.lineno, late, for_types)
        else:
            yield from find_imports(node, late, for_types)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: list(find_imports(ast.parse(path.read_text(encoding="utf-8")))) for name, path in FILES.items()}


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported_module(dotted: str) -> str | None:
    """The file of ours that an import reaches: `lrrobust.x.y` for `from lrrobust.x import y` where y is a file."""
    while dotted and dotted not in FILES:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def test_every_part_has_its_rule():
    assert {part_of(name) for name in FILES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    part = part_of(name)
    wrong = []
    for found in IMPORTS[name]:
        target = imported_module(found.module)
        if target is None or found.is_for_types or part_of(target) == part:
            continue
        allowed = f"{MAY_IMPORT[part]} {MAY_IMPORT_LATE.get(part, '') if found.is_late else ''}".split()
        if not {*allowed} & {part_of(target), target.removeprefix("lrrobust.")}:
            wrong.append(f"line {found.line}: {part} must not import {found.module}")
    assert not wrong, f"{FILES[name]}: " + "; ".join(wrong)


def test_no_cycles():
    graph = {
        name: {imported_module(i.module) for i in imports if not i.is_for_types} - {None, name}
        for name, imports in IMPORTS.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, f"imports run in a circle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                # A package's head runs before its own files: that they meet it again is no circle of ours.
                if not name.startswith(f"{target}."):
                    visit(target)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("package, file", ONLY_IN.items())
def test_heavy_packages_have_one_way_in(package, file):
    users = {
        FILES[name].relative_to(PACKAGE).as_posix()
        for name, imports in IMPORTS.items()
        for found in imports
        if found.module.split(".")[0] == package
    }
    assert users == {file}


def test_torchvision_is_imported_after_its_workaround():
    for name, imports in IMPORTS.items():
        if any(found.module.split(".")[0] in ("torchvision", "torchattacks", "timm") for found in imports):
            assert any(found.module.startswith("lrrobust.torchvision_import") for found in imports), name


def test_the_rules_can_be_broken():
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.b\ndef f():\n    from c import d, e\nimport g\n"
    found = [i for i in find_imports(ast.parse(text)) if i.module != "typing.TYPE_CHECKING"]
    assert found == [
        Import("a.b", 3, False, True),
        Import("c.d", 5, True, False),
        Import("c.e", 5, True, False),
        Import("g", 6, False, False),
    ]
    assert imported_module("lrrobust.models.weights.read_weights") == "lrrobust.models.weights"
    assert imported_module("lrrobust.results.RunStore") == "lrrobust.results"
    assert imported_module("torch.nn") is None


_HELP = """
import sys
sys.argv = ["lrrobust", *sys.argv[1:]]
try:
    from lrrobust.cli import main
    main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    done = run_process(sys.executable, "-c", _HELP, *arguments)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.rpartition("imported:")[2].split())
    assert "typer" in imported and "lrrobust" in imported
    assert not imported & {"torch", "torchvision", "numba", "matplotlib", "pandas", "pyarrow", "numpy", "scipy", "PIL"}


def test_the_readme_shows_every_part_of_the_package():
    tree = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").split("## Where things are")[1]
    parts = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix in ("", ".py") and path.name[0] != "_"
    ]
    assert [part for part in parts if not re.search(rf"(?<![\w.]){re.escape(part)}", tree)] == []


def test_lines_end_within_the_columns_that_the_formatter_is_told():
    settings = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    columns = int(re.search(r"^line-length = (\d+)$", settings, re.MULTILINE)[1])
    files = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    beyond = [
        f"{path.relative_to(PACKAGE.parent)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > columns
    ]
    assert len(files) > 300 and not beyond
