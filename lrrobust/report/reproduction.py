"""How runs and the report on them are made again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from lrrobust.provenance import describe_code, name_commit
from lrrobust.results import Run


class Reproduction(NamedTuple):
    """What makes a report again: commits of its runs, every command once, the report's last, and the code that reports.

    `without_command` are the folders of runs that were made in Python.
    """

    commits: Sequence[str]
    commands: Sequence[str]
    code: str
    without_command: Sequence[str]

    @property
    def how(self) -> str:
        evaluations = (
            f"the code at commit {', '.join(map(name_commit, self.commits))}" if self.commits else "the versions given"
        )
        by_hand = f" Made in Python, by no command: {', '.join(self.without_command)}." if self.without_command else ""
        return f"The evaluations with {evaluations}, this report with {self.code}.{by_hand}"


def reproduction(runs: Sequence[Run], command: Sequence[str]) -> Reproduction:
    """Args: runs in their order; command of the report itself, as in `sys.argv`."""
    found = {str(commit) for run in runs if (commit := (run.manifest.get("provenance") or {}).get("commit"))}
    evaluations = [format_command(run.manifest["command"]) for run in runs if run.manifest.get("command")]
    commands = [*dict.fromkeys(evaluations), format_command(command)]
    without = [run.folder.name for run in runs if not run.manifest.get("command")]
    return Reproduction(sorted(found), commands, describe_code(), without)


def format_command(command: Sequence[str]) -> str:
    """A command line as a shell takes it; where the program lies is a matter of the machine."""
    return shlex.join(["lrrobust", *map(str, command[1:])])
