"""What runs, models and attacks are called where several are shown: as little as tells them apart."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from lrrobust.errors import StoreError
from lrrobust.results import Run, manifest_value

#: Name of the rows that count an image as broken when any attack of the norm breaks it.
WORST_CASE = "worst_case"


def name_attack(attack: str, is_cumulative: bool) -> str:
    """An attack as tables call it, marked where its robust accuracy is not its own work alone.

    An attack of a suite such as `strong` meets only what the attacks before it left standing, and what those broke
    counts as broken in its rows.
    """
    return f"{attack}†" if is_cumulative else attack


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run under the end of its path, as long as it takes for all to differ."""
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise StoreError(f"expected different runs, got {folder} twice: give each once")
    depth = 1
    while len(names := {"/".join(folder.parts[-depth:]): run for folder, run in zip(folders, runs)}) < len(runs):
        depth += 1
    return names


def by_images(named: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Named runs by the sha256 of the images that they are on."""
    found: dict[str, dict[str, Run]] = {}
    for name, run in named.items():
        found.setdefault(manifest_value(run, "dataset", "sha256"), {})[name] = run
    return found


def name_models(named: Mapping[str, Run]) -> dict[str, str]:
    """Run -> its model's name, with as much of the path as tells apart files of one name that hold other code.

    The path is the one given on the command line, which manifests keep beside what identifies the run.
    """
    names = {run: manifest_value(of, "model", "name") for run, of in named.items()}
    paths = {run: _model_path(of, names[run]) for run, of in named.items()}
    for shared in set(names.values()):
        runs = [run for run, name in names.items() if name == shared]
        if len({named[run].manifest["model"].get("code_sha256") for run in runs}) < 2:
            continue
        given = {paths[run] for run in runs}
        depth = 1
        while len({path.parts[-depth:] for path in given}) < len(given):
            depth += 1
        names |= {run: "/".join(paths[run].parts[-depth:]) for run in runs}
    return names


def _model_path(run: Run, name: str) -> PurePath:
    """What the command line called the model of a run; its name where the manifest does not say."""
    request, position = run.manifest.get("request"), run.manifest.get("position")
    if not isinstance(request, dict) or not isinstance(position, int):
        return PurePath(name)
    # Models one after the other, each with all surrogates.
    place = position // max(1, len(request.get("surrogates", ())))
    given = request.get("models", ())[place : place + 1]
    return PurePath(os.path.normpath(given[0])) if given and PurePath(given[0]).name == name else PurePath(name)


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
