"""What days of computing bring, really done to real processes and files: nothing computed is lost or counted twice."""

import io
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from own_process import run_process

from lrrobust import cli
from lrrobust.diagnostics.stage import CHECKS
from lrrobust.results import find_runs, load_run

MODEL = """
import os
import time
import torch
from torch import nn
from lrrobust.models import Classifier

class Small(nn.Module):
    def __init__(self, pause_s):
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)))
        self.pause_s = pause_s

    def forward(self, images):
        time.sleep(self.pause_s)
        print("forward")
        if folder := os.environ.get("FORWARDS"):
            with open(f"{folder}/{os.getpid()}", "a") as log:
                log.write("." * len(images))
        return (images - 0.5).flatten(1) @ self.weight.t()

def build():
    return Classifier(Small(0.0), ("ant", "bee", "cat"), input_size=8)

def build_slow():
    return Classifier(Small(0.003), ("ant", "bee", "cat"), input_size=8)

class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise SystemExit(0)

class Leaving(Small):
    def forward(self, images):
        return Leave.apply(super().forward(images))

def build_leaving():
    return Classifier(Leaving(0.0), ("ant", "bee", "cat"), input_size=8)

def build_and_say_when_images_are_read():
    from lrrobust.data.image_source import ImageSource
    decode = ImageSource.decode

    def slow(self, index, encoded):
        open(os.environ["READING"], "w").close()
        time.sleep(0.1)
        return decode(self, index, encoded)

    ImageSource.decode = slow
    return build()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, draw_classes):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "model.py").write_text(MODEL)
    draw_classes(folder / "images", 8)
    return folder


def evaluation(workplace, out, factory="build", dataset="images"):
    """48 parts, and nothing after them."""
    model = f"{workplace / 'model.py'}:{factory}"
    options = ("--attack", "fgsm", "--attack", "pgd", "--chunk-size", 1, "--no-diagnostics")
    return ("eval", "--model", model, "--dataset", workplace / dataset, *options, "--out", out)


def _run_with(environment, arguments):
    os.environ |= {name: str(value) for name, value in environment.items()}
    sys.argv = ["lrrobust", *arguments]
    if "STDERR" in environment:
        os.dup2(os.open(environment["STDERR"], os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    cli.main()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Processes that start at once, forked from one that has everything imported."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "lrrobust_warm.py").write_text(
        "import lrrobust.console.results, lrrobust.run\nfrom lrrobust.attacks.build import _torchattacks\n_torchattacks()\n"
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lrrobust_warm"])

    def start(*arguments, **environment):
        process = context.Process(target=_run_with, args=(environment, [str(argument) for argument in arguments]))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(cli.__file__).parents[1])]))
        # The first process starts the server, which imports.
        start("--version").join(120)
        yield start


def timeless(folder):
    loaded = load_run(folder)
    assert loaded.is_complete
    return loaded.rows.drop(columns="wall_s").reset_index(drop=True)


def parts_in(folder):
    return list(Path(folder).glob("*/parts/*.parquet"))


@pytest.fixture(scope="module")
def whole(workplace, tmp_path_factory):
    """The rows of an evaluation that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    for factory in ("build", "build_slow"):
        assert cli.run([str(a) for a in evaluation(workplace, out / factory, factory)]) == 0
    return {factory: timeless(find_runs(out / factory)[0]) for factory in ("build", "build_slow")}


def test_killed_20_times_at_random_moments(run, workplace, whole, processes, tmp_path):
    rng = random.Random(0)
    kills, grew, round_ = 0, 0, 0
    while kills < 20:
        out = tmp_path / f"{round_}"
        before = len(parts_in(out))
        process = processes(*evaluation(workplace, out, "build_slow"))
        # While it starts, or while it computes and writes.
        wanted = before + rng.choice([0, 1])
        while process.is_alive() and len(parts_in(out)) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3 if wanted == before else 0.05))
        process.kill()
        process.join(60)
        if process.exitcode == 0:  # it was faster: the next kills are for another run
            round_ += 1
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        grew += len(parts_in(out)) > before
    assert grew >= 5
    for number in range(round_ + 1):
        out = tmp_path / f"{number}"
        code, _, err = run(*evaluation(workplace, out, "build_slow"))
        assert code == 0, err
        (folder,) = find_runs(out)
        assert timeless(folder).equals(whole["build_slow"])
        assert len(parts_in(out)) == 48
        # What the dead left half written is gone.
        assert not list(folder.rglob("*.tmp"))


def test_two_processes_on_one_folder(run, workplace, whole, processes, tmp_path):
    arguments = evaluation(workplace, tmp_path, "build_slow")
    first = processes(*arguments)
    deadline = time.monotonic() + 60
    while first.is_alive() and not parts_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.005)
    code, _, err = run(*arguments)
    assert code == 2
    assert f"another lrrobust process (pid {first.pid}) is writing" in err
    first.join(120)
    assert first.exitcode == 0
    assert timeless(find_runs(tmp_path)[0]).equals(whole["build_slow"])


def wait_for(is_there, process):
    deadline = time.monotonic() + 120
    while process.is_alive() and not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_parts(out, count, process):
    wait_for(lambda: len(parts_in(out)) >= count, process)


def half(workplace, out):
    """A smaller evaluation, of 24 parts, for processes that share; what counts here is the rows."""
    return (*evaluation(workplace, out, "build_slow"), "--n", 12)


@pytest.fixture(scope="module")
def alone(workplace, tmp_path_factory):
    """The rows of `half` as one process computes them, and the forward passes that it needs."""
    out, forwards = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("forwards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORWARDS", str(forwards))
        assert cli.run([str(argument) for argument in half(workplace, out)]) == 0
    (log,) = forwards.iterdir()
    return timeless(find_runs(out)[0]), len(log.read_text())


def leases_in(out):
    return list(Path(out).glob("*/leases/*"))


@pytest.mark.parametrize("is_numbered", [False, True], ids=["by hand", "with ranks"])
def test_processes_that_share_divide_the_work(workplace, alone, processes, tmp_path, is_numbered):
    forwards = tmp_path / "forwards"
    forwards.mkdir()
    arguments = (*half(workplace, tmp_path / "out"), *(() if is_numbered else ("--share",)))
    sharers = [
        processes(*arguments, FORWARDS=forwards, **({"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank} if is_numbered else {}))
        for rank in range(2)
    ]
    for sharer in sharers:
        sharer.join(60)
    assert [sharer.exitcode for sharer in sharers] == [0, 0]
    (folder,) = find_runs(tmp_path / "out")
    rows, passes = alone
    assert timeless(folder).equals(rows)
    assert leases_in(tmp_path / "out") == []
    # Each had a good part of the work, and nothing but the few images that try the model was computed twice.
    made = sorted(len(log.read_text()) for log in forwards.iterdir())
    assert len(made) == 2 and made[0] > 0.2 * made[1]
    assert sum(made) < 1.1 * passes


def test_one_of_two_is_killed_and_the_other_finishes(workplace, alone, processes, tmp_path):
    arguments = (*half(workplace, tmp_path), "--share")
    victim, survivor = (processes(*arguments, LRROBUST_LEASE_S=1) for _ in range(2))
    wait_for_parts(tmp_path, 6, victim)
    victim.kill()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert len(parts_in(tmp_path)) < 24
    survivor.join(60)
    assert survivor.exitcode == 0
    (folder,) = find_runs(tmp_path)
    assert timeless(folder).equals(alone[0])
    # What the dead one was at was taken over, unless it had just stored it.
    assert {lease.name for lease in leases_in(tmp_path)} <= {part.stem for part in parts_in(tmp_path)}


def test_the_number_of_ranks_changes_between_restarts(workplace, alone, processes, tmp_path):
    arguments = half(workplace, tmp_path)
    for world_size, parts in ((3, 5), (1, 10)):
        ranks = [processes(*arguments, RANK=rank, WORLD_SIZE=world_size) for rank in range(world_size)]
        wait_for_parts(tmp_path, parts, ranks[0])
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode == -signal.SIGKILL
    # Nobody waits for the dead: whoever comes first when all are gone clears what they held.
    ranks = [processes(*arguments, RANK=rank, WORLD_SIZE=2) for rank in range(2)]
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    (folder,) = find_runs(tmp_path)
    assert timeless(folder).equals(alone[0])
    assert len(parts_in(tmp_path)) == 24


def test_torchrun(workplace, alone, tmp_path):
    # The two dashes keep torchrun from taking --n for an abbreviation of its own options.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "lrrobust"]
    done = run_process(*command, *half(workplace, tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = find_runs(tmp_path)
    assert timeless(folder).equals(alone[0])
    # One of both speaks for all.
    assert done.stdout.count("fgsm") == load_run(folder).rows.query("attack == 'fgsm'")["eps"].nunique()
    assert done.stderr.count("results: ") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_process_asked_to_end_gives_back_what_it_holds(workplace, alone, processes, run, tmp_path, signum):
    """SIGTERM is what SLURM and Kubernetes send before they kill; SIGHUP comes from a terminal that closes."""
    arguments = (*half(workplace, tmp_path), "--share")
    process = processes(*arguments, STDERR=tmp_path / "log")
    wait_for_parts(tmp_path, 3, process)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    how = "interrupted" if signum == signal.SIGINT else f"ended by {signum.name}"
    said = (tmp_path / "log").read_text()
    assert f"{how}: what was finished is kept, the same command goes on from there" in said and "Traceback" not in said
    kept = len(parts_in(tmp_path))
    assert 3 <= kept < 24 and leases_in(tmp_path) == [] and not list(tmp_path.rglob("*.tmp"))
    assert run(*arguments)[0] == 0
    assert timeless(find_runs(tmp_path)[0]).equals(alone[0])


def interrupted(process, log):
    """What a process says when Ctrl-C ends it."""
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    lines = [line for line in Path(log).read_text().splitlines() if line != "forward"]
    assert lines[-1] == "interrupted: what was finished is kept, the same command goes on from there"
    assert not any(line.startswith("Traceback") for line in lines)


def test_ctrl_c_while_images_are_read(workplace, processes, run, whole, tmp_path):
    """Each takes 0.1 s to decode; those that are not begun are not waited for."""
    reading, log = tmp_path / "reading", tmp_path / "log"
    arguments = evaluation(workplace, tmp_path / "out", "build_and_say_when_images_are_read")
    process = processes(*arguments, READING=reading, STDERR=log)
    wait_for(reading.exists, process)
    interrupted(process, log)
    assert not (tmp_path / "out").exists()
    assert run(*evaluation(workplace, tmp_path / "out"))[0] == 0
    assert timeless(find_runs(tmp_path / "out")[0]).equals(whole["build"])


def test_ctrl_c_while_attacks_are_diagnosed(workplace, processes, run, alone, tmp_path):
    log, forwards = tmp_path / "log", tmp_path / "forwards"
    forwards.mkdir()
    arguments = [argument for argument in half(workplace, tmp_path / "out") if argument != "--no-diagnostics"]
    process = processes(*arguments, STDERR=log, FORWARDS=forwards)
    wait_for(lambda: log.exists() and f"diagnostics: {len(CHECKS)} checks" in log.read_text(), process)
    interrupted(process, log)
    (folder,) = find_runs(tmp_path / "out")
    assert timeless(folder).equals(alone[0]) and not (folder / "diagnostics.json").exists()
    code, out, err = run(*arguments)
    assert code == 0 and "going on with" in err and "did the attacks work?" in out
    assert timeless(folder).equals(alone[0]) and (folder / "diagnostics.json").exists()


def test_a_run_that_is_moved_goes_on_where_it_is(workplace, run, whole, tmp_path):
    assert run(*evaluation(workplace, tmp_path / "here"))[0] == 0
    (folder,) = find_runs(tmp_path / "here")
    for part in parts_in(tmp_path / "here")[:10]:
        part.unlink()
    moved = tmp_path / "some" / "where" / folder.name
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    code, _, err = run(*evaluation(workplace, moved.parent))
    assert code == 0 and "going on with" in err
    assert timeless(moved).equals(whole["build"])
    # A report asks for no name.
    moved.rename(tmp_path / "another name")
    code, _, err = run("report", tmp_path / "another name", "--out", tmp_path / "summary")
    assert code == 0, err
    assert (tmp_path / "summary" / "report.html").exists()


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
def test_files_have_the_mode_that_the_user_wants(workplace, run, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert run(*evaluation(workplace, tmp_path / "runs"), "--n", 2)[0] == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "runs").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LRROBUST_LEASE_S"])
def test_an_environment_without_numbers_is_one_line(run, workplace, tmp_path, monkeypatch, name):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LRROBUST_LEASE_S": "9"}.items():
        monkeypatch.setenv(variable, value if variable != name else "two")
    code, _, err = run(*evaluation(workplace, tmp_path))
    assert code == 2 and f"the environment variable {name} must be a number, found 'two'" in err


@pytest.mark.parametrize("damage", ["truncated", "another part"])
def test_a_damaged_part_is_said_and_done_again(run, workplace, whole, tmp_path, caplog, damage):
    arguments = evaluation(workplace, tmp_path)
    assert run(*arguments)[0] == 0
    parts = sorted(parts_in(tmp_path))
    victim = parts[7]
    victim.write_bytes(victim.read_bytes()[:1000] if damage == "truncated" else parts[8].read_bytes())
    with caplog.at_level(logging.WARNING):
        code, _, err = run(*arguments)
    assert code == 0, err
    assert any(victim.name in message and "computed again" in message for message in caplog.messages)
    assert timeless(find_runs(tmp_path)[0]).equals(whole["build"])


def test_a_report_of_nothing_is_refused_and_written_nowhere(run, workplace, tmp_path):
    assert run(*evaluation(workplace, tmp_path))[0] == 0
    for part in parts_in(tmp_path):
        part.write_bytes(b"")
    code, _, err = run("report", tmp_path, "--out", tmp_path / "report")
    assert code == 2 and err.splitlines()[-1].startswith("error: nothing to report: no run in ")
    assert not (tmp_path / "report").exists()


def test_a_model_that_ends_the_program_does_not_choose_the_exit_code(run, workplace, tmp_path):
    """In backward, where it is not called by us; with its 0 a gate in somebody's CI would pass."""
    code, out, err = run(*evaluation(workplace, tmp_path, "build_leaving"))
    assert code == 2 and out == ""
    assert f"error: something called sys.exit(0) before the command was done ({workplace / 'model.py'}, line " in err


def test_what_a_model_prints_is_no_result(run, workplace, tmp_path):
    code, out, err = run(*evaluation(workplace, tmp_path), "--n", 2)
    assert code == 0 and "forward" in err and "forward" not in out and "fgsm" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_folder_that_becomes_read_only(run, workplace, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        arguments = evaluation(workplace, disk)
        assert run(*evaluation(workplace, disk, "build"), "--n", 5)[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, _, err = run(*arguments)
        assert code == 2 and "not allowed to write" in err and "Read-only" in err
        assert len(parts_in(disk)) == 10
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert run(*arguments)[0] == 0
        assert any(timeless(folder).equals(whole["build"]) for folder in find_runs(disk))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_corrupt_image_in_the_middle_of_a_tar(run, workplace, tmp_path):
    with tarfile.open(workplace / "images.tar", "w") as archive:
        for path in sorted((workplace / "images").rglob("*.png")):
            content = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(workplace).as_posix())
            content = content[: len(content) // 2] if member.name.endswith("bee/4.png") else content
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    arguments = evaluation(workplace, tmp_path, dataset="images.tar")
    code, _, err = run(*arguments)
    assert code == 2 and "bee/4.png" in err and "--skip-corrupt" in err
    code, _, err = run(*arguments, "--skip-corrupt")
    assert code == 0, err
    assert "skipped, as they cannot be decoded: 1 image, 'bee/4.png'" in err
    (folder,) = find_runs(tmp_path)
    rows = load_run(folder).rows
    assert rows["key"].nunique() == 23 and "bee/4.png" not in set(rows["key"])


def test_clocks_may_jump(run, workplace, whole, tmp_path, monkeypatch):
    """The computer's clock runs backwards and leaps by years; no row follows it."""
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: int(rng.uniform(0, 4e18)))
    assert run(*evaluation(workplace, tmp_path), "--device", "cpu")[0] == 0
    (folder,) = find_runs(tmp_path)
    # Dates of files say nothing either.
    for path in folder.rglob("*"):
        os.utime(path, (rng.uniform(0, 4e9),) * 2)
    code, _, err = run(*evaluation(workplace, tmp_path))
    assert code == 0 and "going on with" in err
    assert timeless(folder).equals(whole["build"])
    assert (load_run(folder).rows["wall_s"].to_numpy(float) >= 0).all()
