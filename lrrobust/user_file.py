"""Python files of the user's own, of models and attacks: the one place where a name on the command line runs code."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from lrrobust.determinism import arithmetic_kept
from lrrobust.errors import LrRobustError
from lrrobust.torchvision_import import import_torchvision

T = TypeVar("T")


def run_user_file(file: str, expected: str, take: Callable[[ModuleType], T], kind: type[LrRobustError]) -> T:
    """Runs a file, which may import modules from its own folder, and takes from it what is wanted while they are known.

    Args:
        file: as it was given.
        expected: what a name is to look like, for the error where there is no such file.
        take: of the file as a module.
        kind: of the error.

    Raises:
        kind: there is no such file; or it, or `take`, fails: with what, and in which of its lines.
    """
    if not os.path.isfile(file):
        raise kind(f"no file {file}: {expected}")
    import_torchvision()  # mended, should the file import it
    # Absolute, as Python names the file in tracebacks.
    path = Path(file).absolute()
    # Two files of one name are two modules.
    unique = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"lrrobust_user_{path.stem}_{unique}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up here.
    sys.modules[spec.name] = module
    folder = str(path.parent)
    working_folder = os.getcwd()
    loaded_before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        # One file must not change what others of the command compute.
        with arithmetic_kept():
            spec.loader.exec_module(module)
            return take(module)
    except (LrRobustError, KeyboardInterrupt):
        raise
    except BaseException as error:
        where = _line_in(error, path)
        raise kind(f"{file}{where} failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        # What else the command names, images and results, is meant from where it was given.
        os.chdir(working_folder)
        # Not the first entry blindly: the file may have put others in front, or have taken this one out.
        if folder in sys.path:
            sys.path.remove(folder)
        # Helpers beside the file are its own: another file's helper may have the same name.
        for helper in set(sys.modules) - loaded_before:
            if (getattr(sys.modules[helper], "__file__", None) or "").startswith(folder + os.sep):
                del sys.modules[helper]
        _beside.add(folder)


class _Beside(importlib.abc.MetaPathFinder):
    """Finds, where nobody else does, what lies beside these files: for imports while something of theirs is called.

    Not what lies beside two of them, since who imports is not known here. Nor mere folders: what others do without where it
    is not installed, such as wandb, leaves folders of its name.
    """

    def __init__(self) -> None:
        self._folders: list[str] = []

    def add(self, folder: str) -> None:
        if folder not in self._folders:
            self._folders.append(folder)
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None:
            return None
        found = [importlib.machinery.PathFinder.find_spec(fullname, [folder]) for folder in self._folders]
        modules = [spec for spec in found if spec is not None and spec.origin is not None]
        return modules[0] if len(modules) == 1 else None


_beside = _Beside()


def _line_in(error: BaseException, path: Path) -> str:
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if Path(traceback.tb_frame.f_code.co_filename) == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line is not None else ""
