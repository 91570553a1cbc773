"""Progress of long work: bars on a terminal, else a line now and then."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lrrobust.console import streams
from lrrobust.console.streams import notice
from lrrobust.formatting import format_eps

if TYPE_CHECKING:
    import torch

    from lrrobust.evaluation.tasks import Task
    from lrrobust.planned_evaluation import Evaluation
    from lrrobust.training.trainer import Progress as TrainingState
    from lrrobust.training.trainer import Training


#: Without a terminal a line of progress at most this often.
_LINE_INTERVAL_S = 30.0


#: A slower bfloat16 is worth a line from here on: below, what it saves in memory traffic may make up for it.
_SLOW_BF16 = 2.0


def _notice_slow_bf16(device: torch.device) -> None:
    from lrrobust.half_precision import bf16_slowdown

    slowdown = bf16_slowdown(device)
    if slowdown > _SLOW_BF16:
        notice(
            f"warning: this processor emulates bf16 (a matrix product takes {slowdown:.0f} times as long as in float32): "
            "`--precision float32` is much faster here"
        )


@contextmanager
def scanning(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for reading images, gone when it is done; yields the callback that moves it."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=streams.notices,
        transient=True,
        disable=not streams.notices.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _build_bar(*columns: ProgressColumn | str) -> Progress:
    """A bar for long work on a terminal; `state` of its task is free text."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        *columns,
        console=streams.notices,
        disable=not streams.notices.is_terminal,
    )


class EvaluationProgress:
    """Progress of one evaluation, with the time left estimated from forward passes still to do."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._bar = _build_bar()
        surrogate = evaluation.manifest.get("surrogate")
        self._name = evaluation.manifest["model"]["name"] + (f" (attacking {surrogate['name']})" if surrogate else "")
        self._parts_done = 0
        self._is_resumed = False
        #: Forward passes that the parts of each attack still to do need at most, and those that parts finished since the
        #: start, here and anywhere, would have needed at most.
        self._left: Counter[str] = Counter()
        for task in evaluation.tasks:
            self._left[task.spec.name] += task.cost
        self._finished_here: Counter[str] = Counter()
        self._finished = 0
        #: Passes really made: fewer, because images wrong when clean or broken are not attacked.
        self._made: Counter[str] = Counter()
        self._present = 0
        #: What parts begun here need at most, by cost alone and by the images that they really attack; that of them which
        #: is not finished, and what it needs at most.
        self._begun = self._begun_bound = 0.0
        self._at: Task | None = None
        self._at_bound = 0.0
        self._opened = self._last_line = time.monotonic()
        #: End of the first pass; what comes before, such as compiling, tells nothing of the speed.
        self._started: float | None = None

    def __enter__(self) -> EvaluationProgress:
        if any(getattr(task.spec, "precision", None) == "bf16" for task in self._evaluation.tasks):
            _notice_slow_bf16(self._evaluation.device)
        self._bar.start()
        self._task = self._bar.add_task(self._name, total=self._left.total(), state=self._parts())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_begin(self, task: Task, share: float) -> None:
        self._at, self._at_bound = task, share * task.cost
        self._begun += task.cost
        self._begun_bound += self._at_bound

    def on_forward(self, count: int) -> None:
        if self._started is None:
            # How long this one took is not known, so it does not count.
            self._started = time.monotonic()
            return
        self._present += count
        self._show()

    def on_task(self, task: Task, is_new: bool) -> None:
        self._parts_done += 1
        self._left[task.spec.name] -= task.cost
        if is_new:
            self._finished_here[task.spec.name] += task.cost
            self._made[task.spec.name] += self._present
            self._present = 0
            self._at = None
        elif not self._is_resumed and not self._done():
            notice(f"going on with {self._evaluation.folder}")
            self._is_resumed = True
        # What is stored once the work has begun, others have done that share it.
        if is_new or self._done():
            self._finished += task.cost
        self._show()

    def _show(self) -> None:
        done = self._done()
        total = done + self._passes_left()[0]
        self._bar.update(self._task, completed=done, total=total, state=f"{self._parts()}{self._time_left()}")
        now = time.monotonic()
        if streams.notices.is_terminal or now - self._last_line < _LINE_INTERVAL_S or not done:
            return
        self._last_line = now
        notice(f"{self._name}: {self._parts()}, {now - self._opened:.0f} s{self._time_left()}")

    def _done(self) -> int:
        """Passes made since the start."""
        return self._made.total() + self._present

    def _passes_left(self) -> tuple[float, bool]:
        """Passes still to make, and whether this is a bound rather than an estimate.

        What parts need is known only as an upper bound, and those of an attack that are finished say how far off it is for
        that attack. For other attacks the parts begun say what share is attacked at all.
        """
        attacked = self._begun_bound / self._begun if self._begun_bound else 1.0
        shares = {name: self._made[name] / self._finished_here[name] if self._made[name] else attacked for name in self._left}
        needed = sum(left * shares[name] for name, left in self._left.items())
        is_bound = any(left and not self._made[name] for name, left in self._left.items())
        if self._at is not None and self._present >= (expected := self._at.cost * shares[self._at.spec.name]):
            # A part that needs more than those before it: all the others are still to do.
            return needed - expected + max(self._at_bound - self._present, 0.0), True
        return max(needed - self._present, 0.0), is_bound

    def _time_left(self) -> str:
        """By the speed of the passes made so far, those of others who share the work included."""
        if not self._done() or self._started is None:
            return ""
        passes, is_bound = self._passes_left()
        seconds = (time.monotonic() - self._started) * passes / self._done()
        if self._finished_here.total():
            seconds *= self._finished_here.total() / self._finished
        return f", {'at most' if is_bound else 'about'} {_round_duration(seconds)} left"

    def _parts(self) -> str:
        return f"{self._parts_done}/{len(self._evaluation.tasks)} parts"


def _round_duration(seconds: float) -> str:
    """As exact as an estimate is: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def diagnosing(evaluation: Evaluation) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the diagnostics of one run; yields the callback that moves it."""
    name = f"{evaluation.manifest['model']['name']}: diagnostics"
    with _build_bar("left", TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=None, state="")
        started = False

        def on_check(check: str, done: int, total: int) -> None:
            nonlocal started
            # Without a terminal one line says what takes the time.
            if not started and not streams.notices.is_terminal:
                notice(f"{name}: {total} checks")
            started = True
            bar.update(task, completed=done, total=total, state=check.replace("_", " "))

        yield on_check


class TrainingProgress:
    """Progress of a training run: loss, speed, time left; one line an epoch, and without a terminal now and then."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._bar = _build_bar("left", TimeRemainingColumn())
        self._last_line = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        if self._training.recipe.precision == "bf16":
            _notice_slow_bf16(self._training.device)
        if self._training.step:
            notice(f"going on at step {self._training.step} of {self._training.steps}")
        self._bar.start()
        self._task = self._bar.add_task(
            self._training.model_name, total=self._training.steps, completed=self._training.step, state=""
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_step(self, state: TrainingState) -> None:
        text = f"epoch {state.epoch}/{state.epochs} loss {state.loss:.3f} {state.images_per_s:.0f} img/s"
        self._bar.update(self._task, completed=state.step, state=text)
        now = time.monotonic()
        if not streams.notices.is_terminal and now - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = now
            notice(f"{self._training.model_name}: step {state.step}/{state.steps}, {text}")

    def on_epoch(self, row: dict[str, Any]) -> None:
        top1 = row["holdout_top1"]
        accuracy = "" if math.isnan(top1) else f"held-out top-1 {100 * top1:.1f} %, "
        notice(
            f"epoch {row['epoch']}: {row['image_size']} px, loss {row['train_loss']:.3f}, {accuracy}"
            f"{row['images_per_s']:.0f} img/s"
        )


@contextmanager
def bench_progress(name: str) -> Iterator[Callable[[str], None]]:
    """A bar that says what a benchmark is at, without a terminal a line now and then; yields the callback that changes it."""
    last_line = -math.inf
    with _build_bar() as bar:
        task = bar.add_task(name, total=None, state="")

        def show(text: str) -> None:
            nonlocal last_line
            bar.update(task, state=text)
            if not streams.notices.is_terminal and time.monotonic() - last_line >= _LINE_INTERVAL_S:
                last_line = time.monotonic()
                notice(f"{name}: {text}")

        yield show


@contextmanager
def crosscheck_progress() -> Iterator[Callable[[str, str, str, float], None]]:
    """A line that says what a cross-check is at, gone when it is done; yields the callback that changes it."""
    with streams.notices.status("") as status:

        def show(peer: str, attack: str, norm: str, eps: float) -> None:
            text = f"{peer}: {attack}, eps {format_eps(eps, norm)}"
            status.update(text)
            if not streams.notices.is_terminal:
                notice(text)

        yield show
