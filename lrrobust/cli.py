"""The command line: parse, call, say what came of it. How a command ends is in `lrrobust.exits`.

Heavy imports stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lrrobust import __version__
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.exits import Commands, Interrupted, StandardOutput, Unheard, run_command
from lrrobust.interrupts import raise_on_signals
from lrrobust.process_settings import settle_process

if TYPE_CHECKING:
    from lrrobust.evaluation.task_queue import Sharing
    from lrrobust.planned_evaluation import Evaluation
    from lrrobust.run import EvaluationRequest


# Options of several commands.
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
_InputSize = Annotated[
    Optional[int], typer.Option(min=1, help="Side of the images in pixels, instead of what the weights state.")
]
_EvaluateOn = Annotated[
    Optional[list[str]], typer.Option("--evaluate-on", help="Data set to measure the result on; repeatable.")
]
_Note = Annotated[str, typer.Option(help="Kept in the weights' metadata.")]

app = typer.Typer(
    name="lrrobust",
    cls=Commands,
    help="How robust an image classifier really is to adversarial attacks, and whether a robustness claim holds.",
    no_args_is_help=True,
    # rich's tables of options cut their names where the terminal is narrow, or is none.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lrrobust {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("eval")
def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model", "-m", help="lr_resnet50, resnet50, a torchvision name, timm:NAME, or file.py:factory; repeatable."
        ),
    ],
    attack: Annotated[
        Optional[list[str]],
        typer.Option(
            "--attack", "-a", help="A shipped attack, a YAML file or your file.py:attack; repeatable. See `lrrobust attacks`."
        ),
    ] = None,
    suite: Annotated[
        Optional[list[str]],
        typer.Option(help="A shipped suite or a YAML file; repeatable. Without --attack and --suite: standard."),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "-d",
            help="`photos` (500 real 64x64 photos, fetched once), a folder of class folders, a zip or tar, a CSV of labels, "
            "or archives as a glob; PATH#SPLIT chooses a part.",
        ),
    ] = "photos",
    n: Annotated[Optional[int], typer.Option(min=1, help="Evaluate this many images, drawn by --seed; default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the subset and of the attacks.")] = 0,
    balanced: Annotated[bool, typer.Option(help="Draw equally many images of each class.")] = False,
    indices: Annotated[Optional[Path], typer.Option(help="File with one image number a line, instead of --n.")] = None,
    skip_corrupt: Annotated[bool, typer.Option(help="Leave out images that cannot be decoded, and say which.")] = False,
    weights: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Weights file (.safetensors, .pt), torchvision weights name, none (random), or DEFAULT (the model's own); "
            "once for each --model."
        ),
    ] = None,
    surrogate: Annotated[
        Optional[list[str]],
        typer.Option(
            "--surrogate",
            help="Attack this model instead, and judge on each --model the images made on it (transfer); repeatable. "
            "A model that is its own surrogate is attacked itself.",
        ),
    ] = None,
    surrogate_weights: Annotated[Optional[list[str]], typer.Option(help="As --weights; once for each --surrogate.")] = None,
    classes: Annotated[
        Optional[str],
        typer.Option(
            help="Class list of weights that carry none: tiny-imagenet-200, imagenet-1k, cifar-10, cifar-100, or a text file."
        ),
    ] = None,
    input_size: _InputSize = None,
    eps: Annotated[
        Optional[list[str]],
        typer.Option(help="Budgets instead of the attack's, as 1/255,2/255; repeatable; all attacks must share a norm."),
    ] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, help="Steps instead of the attack's, in all that take steps.")] = None,
    restarts: Annotated[
        Optional[int], typer.Option(min=1, help="Restarts instead of the attack's, in all that have some.")
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="float32 or bf16, instead of the attack's; verdicts are float32 in any case.")
    ] = None,
    eot_iter: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="For randomised models: let attacks follow the mean logits of this many passes, instead of one."
        ),
    ] = None,
    quantize: Annotated[
        bool,
        typer.Option("--quantize", help="Judge adversarial images rounded to 8 bits as well; attacks go on until those break."),
    ] = False,
    save_adversarial: Annotated[
        bool,
        typer.Option("--save-adversarial", help="Keep the rounded images that are still adversarial, for `lrrobust export`."),
    ] = False,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Images stored together; part of a run's identity.")
    ] = DEFAULT_CHUNK_SIZE,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images of a chunk passed through the model at once; part of a run's identity.")
    ] = DEFAULT_BATCH_SIZE,
    device: _Device = "auto",
    out: Annotated[Path, typer.Option(help="Each run gets a folder of its own in here.")] = Path("reports/runs"),
    share: Annotated[
        bool,
        typer.Option(
            "--share", help="Share the work with other processes given the same command; those of torchrun do so anyway."
        ),
    ] = False,
    diagnostics: Annotated[
        bool,
        typer.Option("--diagnostics/--no-diagnostics", help="Look into whether the attacks worked, once the rows are there."),
    ] = True,
) -> None:
    """Attack models and tell how many images stay correct.

    Calling the same command again goes on where the last one stopped.
    """
    from lrrobust.attacks.suite import load_suite

    attacks = tuple([*(attack or []), *(suite or [])]) or ("standard",)
    # Before torch is imported, which may take seconds: a misspelt name is said at once.
    load_suite(attacks)

    from lrrobust.console.results import print_results
    from lrrobust.console.streams import be_quiet
    from lrrobust.processes import choose_sharing
    from lrrobust.run import EvaluationRequest

    sharing = choose_sharing(share, os.environ)
    is_first = sharing is None or sharing.rank == 0
    if not is_first:
        be_quiet()
    request = EvaluationRequest(
        models=tuple(model),
        attacks=attacks,
        weights=tuple(weights or ()),
        surrogates=tuple(surrogate or ()),
        surrogate_weights=tuple(surrogate_weights or ()),
        dataset=dataset,
        classes=classes,
        input_size=input_size,
        n=n,
        seed=seed,
        balanced=balanced,
        indices=indices,
        skip_corrupt=skip_corrupt,
        eps=_split(eps),
        steps=steps,
        restarts=restarts,
        precision=precision,
        eot_iter=eot_iter,
        quantize=quantize,
        save_adversarial=save_adversarial,
        chunk_size=chunk_size,
        batch_size=batch_size,
        device=device,
        out=out,
    )
    evaluations = _prepare(request)
    _run_all(evaluations, sharing)
    if is_first:
        if diagnostics:
            _diagnose_all(evaluations)
        print_results([evaluation.folder for evaluation in evaluations])


def _split(given: list[str] | None) -> tuple[str, ...] | None:
    """The values of an option that takes several, behind commas and repeated; None without any."""
    return tuple(part.strip() for each in given for part in each.split(",")) if given else None


@contextmanager
def _models_on_stderr() -> Iterator[None]:
    """Standard output is for results, which programs may read: what a user's model prints goes to standard error."""
    with redirect_stdout(sys.stderr):
        yield


@_models_on_stderr()
def _prepare(request: EvaluationRequest) -> list[Evaluation]:
    from lrrobust.console.progress import scanning
    from lrrobust.console.results import report_subset, warn_of_former
    from lrrobust.run import prepare_evaluations

    with scanning("reading images") as on_scan:
        evaluations = prepare_evaluations(request, sys.argv, on_scan)
    report_subset(evaluations[0].images)
    for evaluation in evaluations:
        warn_of_former(evaluation.find_former())
    return evaluations


@_models_on_stderr()
def _run_all(evaluations: list[Evaluation], sharing: Sharing | None = None) -> None:
    from lrrobust.console.progress import EvaluationProgress

    for evaluation in evaluations:
        with EvaluationProgress(evaluation) as progress:
            evaluation.run(progress.on_task, progress.on_forward, progress.on_begin, sharing)


@_models_on_stderr()
def _diagnose_all(evaluations: list[Evaluation]) -> None:
    from lrrobust.console.progress import diagnosing

    for evaluation in evaluations:
        # Images made on another model say nothing of attacks on this one.
        if evaluation.surrogate is not None:
            continue
        with diagnosing(evaluation) as on_check:
            evaluation.diagnose(on_check)


@contextmanager
def _fresh_folder(out: Path | None) -> Iterator[Path]:
    """`out`, or a private folder that is removed afterwards: nothing computed before can stand in for a fresh run."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory(prefix="lrrobust-check-") as folder:
        try:
            yield Path(folder)
        except KeyboardInterrupt as cause:
            raise Interrupted(cause, "nothing was compared or kept; with --out FOLDER a check can be resumed") from None


@app.command()
def check(
    baseline: Annotated[Path, typer.Argument(help="The baseline, a JSON file.")],
    run: Annotated[
        Optional[list[Path]],
        typer.Option("--run", help="Compare this run, instead of evaluating anew; once for each model of the evaluation."),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the baseline instead of comparing with it.")] = False,
    model: Annotated[
        Optional[list[str]], typer.Option("--model", "-m", help="Where the models are now; once for each of the baseline's.")
    ] = None,
    weights: Annotated[
        Optional[list[str]], typer.Option(help="Where the weights are now; once for each of the baseline's models.")
    ] = None,
    dataset: Annotated[Optional[str], typer.Option("--dataset", "-d", help="Where the data set is now.")] = None,
    device: _Device = "auto",
    out: Annotated[
        Optional[Path], typer.Option(help="Keep the fresh run in here, so that it can be resumed; default: not kept.")
    ] = None,
    significance: Annotated[
        Optional[float], typer.Option(help="Probability of failing without a cause; default: the baseline's, at first 0.025.")
    ] = None,
    floor: Annotated[
        Optional[float], typer.Option(help="Smallest fall that fails, in points; default: the baseline's, at first 1.")
    ] = None,
    weights_may_change: Annotated[
        Optional[bool],
        typer.Option(
            "--weights-may-change/--weights-must-match",
            help="Whether other weights or code of a model are compared, or refused; "
            "default: the baseline's, at first refused.",
        ),
    ] = None,
    formats: Annotated[
        Optional[list[str]],
        typer.Option(
            "--format",
            help="text, json, junit, markdown or github, or FORMAT=FILE; repeatable. "
            "Default: text, and on GitHub Actions github (annotations and step summary).",
        ),
    ] = None,
) -> None:
    """Compare a fresh evaluation with a baseline.

    Exit code 1 when robust accuracy fell by more than chance allows.

    A baseline is made from a run, `lrrobust check baseline.json --update --run reports/runs/...`, and records how to do the
    evaluation again: `lrrobust check baseline.json` does so and compares. Another attack, setting, data set, subset or
    preprocessing is another comparison, and so are other weights unless --weights-may-change: exit code 2.
    With --update, options that say when a check fails are kept in the baseline.
    """
    from lrrobust.check.baseline import Rule, build_baseline, read_baseline, write_baseline
    from lrrobust.check.compare import another_comparison, compare, find_differences, require_sensitivity
    from lrrobust.check.formats import choose_outputs, printable, write_outputs
    from lrrobust.console.products import print_baseline
    from lrrobust.errors import BaselineError, ConfigError, StoreError
    from lrrobust.results import keep_copy, load_run

    outputs = choose_outputs(formats or (), os.environ)
    try:
        before = read_baseline(baseline)
    except BaselineError as error:
        # A run at hand makes the file anew, be it missing or damaged.
        if not (update and run):
            raise
        before = None
        if baseline.exists():
            # It may be something else altogether, under a name given by mistake.
            kept = keep_copy(baseline)
            logging.warning("%s; made anew, with the rule that a new one has; what was there is kept as %s", error, kept)
    rule = before.rule if before is not None else Rule()
    rule = rule.replaced(significance, None if floor is None else floor / 100, weights_may_change)
    if before is not None:
        before = before.model_copy(update={"rule": rule})
        if not update:
            require_sensitivity(before, str(baseline))
    result = None
    with _fresh_folder(out) as folder:
        if run:
            if model or weights or dataset or out or device != "auto":
                others = "--model, --weights, --dataset, --device and --out"
                raise ConfigError(f"--run compares a run that is there, and evaluates nothing: leave out {others}")
            runs = [load_run(path) for path in run]
        else:
            from lrrobust.run import EvaluationRequest

            given = {"models": tuple(model or ()), "weights": tuple(weights or ()), "dataset": dataset}
            changes = {key: value for key, value in given.items() if value}
            evaluations = _prepare(EvaluationRequest.from_record(before.request, device=device, out=folder, **changes))
            # Before the long work, where that is known already.
            differences, _ = find_differences(before, [evaluation.manifest for evaluation in evaluations])
            if differences and not update:
                result = another_comparison(before, differences, str(baseline))
            elif all(each.folder.exists() and load_run(each.folder).is_complete for each in evaluations):
                done = " ".join(f"--run {evaluation.folder}" for evaluation in evaluations)
                raise StoreError(
                    f"{out} holds this evaluation already, from an earlier check: take {done} for --out to mean that one, "
                    "or choose another --out to evaluate afresh"
                )
            else:
                _run_all(evaluations)
                runs = [load_run(evaluation.folder) for evaluation in evaluations]
        if update:
            now = build_baseline(runs, rule)
            try:
                require_sensitivity(now, str(baseline))
                doubt = None
            except BaselineError as error:
                doubt = str(error)
                if before is not None:
                    doubt += f"; the one before is kept as {keep_copy(baseline)}"
            write_baseline(baseline, now)
            print_baseline(baseline, before, now, doubt)
            return
        if result is None:
            result = compare(before, runs, str(baseline))
    is_refused = result.verdict == "another_comparison"
    # A refusal is an error, which people read once, on standard error.
    write_outputs(result, [each for each in outputs if not (is_refused and each == ("text", None))], os.environ, typer.echo)
    if is_refused:
        raise BaselineError(printable(result.reason))
    raise typer.Exit(1 if result.verdict == "regressed" else 0)


@app.command()
def report(
    runs: Annotated[
        Optional[list[Path]], typer.Argument(help="Run folders, or folders that hold some.", show_default="reports/runs")
    ] = None,
    claim: Annotated[
        Optional[list[str]],
        typer.Option(
            help="A shipped claim or a YAML file; repeatable.",
            show_default="lrnet_more_robust, where there are runs of its models",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where page, tables and figures go.")] = Path("reports/summary"),
    budget: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NORM:EPS",
            help="A column of the table of worst cases, such as linf:8/255; repeatable.",
            show_default="all that were attacked",
        ),
    ] = None,
    label: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="MODEL=TEXT",
            help='What that table calls a model, as resnet50="ResNet-50 (ours)"; MODEL@WEIGHTS as in claims; repeatable.',
        ),
    ] = None,
    gallery: Annotated[
        bool, typer.Option("--gallery/--no-gallery", help="Whether the page shows images; not where they may not be published.")
    ] = True,
) -> None:
    """Judge claims, and write a page, tables and figures of runs.

    The page is report.html; tables are CSV, Markdown and LaTeX, figures PNG, SVG and PDF.

    They take the place of an earlier report's in the same folder when all are written; what only that one wrote is removed. A
    file of theirs that was changed since, or that no report wrote, is kept as FILE.old.
    """
    from lrrobust.console.results import print_report, print_verdicts, warn_of_checks
    from lrrobust.errors import ConfigError, StoreError
    from lrrobust.page import write_page
    from lrrobust.page.claim_figures import sketch_claims
    from lrrobust.report.drawing import Drawers
    from lrrobust.report.figures import sketch_runs
    from lrrobust.report.files import write_report
    from lrrobust.report.staging import staging
    from lrrobust.report.summary import summarise
    from lrrobust.report.worst_case import parse_budget, worst_cases_by_images
    from lrrobust.results import find_runs, load_run
    from lrrobust.transfer_report import write_transfer
    from lrrobust.verdict.claims import DEFAULT_CLAIM, load_claims
    from lrrobust.verdict.evidence import is_of, label_runs
    from lrrobust.verdict.judge import judge_claims, write_verdicts

    claims = load_claims(claim or [DEFAULT_CLAIM])
    budgets = [parse_budget(each) for each in budget or ()]
    roots = runs or [Path("reports/runs")]
    folders = [folder for root in roots for folder in find_runs(root)]
    if not folders:
        raise StoreError(f"no runs in {', '.join(map(str, roots))}: run `lrrobust eval` first, or name the folder of a run")
    with Drawers() as drawers:
        # There are two or three of each run, with those of claims.
        drawers.expect(2 * len(folders))
        loaded = []
        for folder in dict.fromkeys(folders):
            try:
                loaded.append(load_run(folder))
            except StoreError as error:
                if len(folders) == 1:
                    raise
                logging.warning("left out: %s", error)
        if not any(len(run.rows) for run in loaded):
            raise StoreError(
                f"nothing to report: no run in {', '.join(map(str, roots))} holds a result that can be read; "
                "run its `lrrobust eval` command again, which computes what is missing"
            )
        if not claim and not any(
            is_of(run, side) for run in loaded for each in claims for side in (each.treatment, each.control)
        ):
            claims = []  # nobody asked for it
        warn_of_checks(loaded)
        worst = worst_cases_by_images(loaded, budgets, label_runs(label or (), loaded))
        summary = summarise(loaded)
        of_runs = drawers.begin(sketch_runs(loaded, summary))
        verdicts = judge_claims(claims, loaded)
        print_verdicts(verdicts)
        of_claims = [drawers.begin(sketches) for sketches in sketch_claims(verdicts.results)]
        with staging(out) as staged:
            write_verdicts(verdicts, staged.folder / "claim.json")
            write_page(
                loaded, staged.folder, sys.argv, verdicts, of_runs, summary,
                claim_drawings=of_claims, worst=worst, with_gallery=gallery,
            )  # fmt: skip
            write_report(loaded, staged.folder, of_runs(), summary, sys.argv, worst)
            write_transfer(loaded, staged.folder)
    print_report(loaded, summary, staged.written, staged.removed, staged.kept)
    if claim and (silent := {each.name for each in claims} - {result.claim.name for result in verdicts.results}):
        raise ConfigError(f"no verdict on {', '.join(sorted(silent))}, for the reasons above; the report is written without")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run made with --save-adversarial.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of the images and their index.", show_default="reports/adversarial/RUN")
    ] = None,
) -> None:
    """Write the adversarial images of a run as PNG files.

    They are of 8 bits; an index (Parquet) lies beside them.
    """
    from lrrobust.console.products import print_export
    from lrrobust.export import export_adversarial
    from lrrobust.results import load_run

    loaded = load_run(run)
    print_export(export_adversarial(loaded, out if out is not None else Path("reports/adversarial") / run.resolve().name))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Images written by `lrrobust export`.")],
    model: Annotated[str, typer.Option("--model", "-m", help="As for eval: the model of the run, or any other.")],
    weights: Annotated[Optional[str], typer.Option(help="As for eval.")] = None,
    input_size: _InputSize = None,
    device: _Device = "auto",
) -> None:
    """Read exported images back and judge them again.

    Exit code 1 when one no longer fools the model it was made for.
    """
    from lrrobust.console.products import print_verification
    from lrrobust.processes import choose_device
    from lrrobust.run import load_named
    from lrrobust.verify import verify_export

    with _models_on_stderr():
        found, is_same_model = verify_export(folder, load_named(model, weights, input_size=input_size), choose_device(device))
    print_verification(found, is_same_model)
    is_failed = is_same_model and any(each.adversarial < each.n for each in found)
    raise typer.Exit(1 if is_failed else 0)


@app.command()
def train(
    model: Annotated[str, typer.Option("--model", "-m", help="lr_resnet26/50/101 or resnet26/50/101.")],
    data: Annotated[str, typer.Option(help="Training images: folder, zip, tar, or archives as a glob.")],
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a YAML file.")] = "tiny_imagenet_short",
    evaluate_on: _EvaluateOn = None,
    name: Annotated[str, typer.Option(help="Name of the weights, as in TINY_IMAGENET_V1.")] = "CUSTOM",
    note: _Note = "",
    out: Annotated[
        Optional[Path],
        typer.Option(help="Folder of checkpoint, log and weights.", show_default="reports/training/MODEL"),
    ] = None,
    device: _Device = "auto",
    initial_weights: Annotated[
        Optional[Path], typer.Option(help="File of weights to go on from instead of fresh ones.")
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="float32 or bf16, instead of the recipe's; part of what the training is.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images, where the recipe streams them.")] = 8,
    stop_after: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Epochs of the recipe's schedule to stop after, with the weights of then; going on replaces these, but for "
            "another --name.",
            show_default="all",
        ),
    ] = None,
) -> None:
    """Train a network by a recipe, under torchrun on many GPUs.

    Calling the same command again goes on where the last one stopped.
    """
    from lrrobust.console.products import print_weights
    from lrrobust.console.progress import TrainingProgress, scanning
    from lrrobust.learning_curves import plot_learning_curves
    from lrrobust.processes import choose_device
    from lrrobust.train import TrainingRequest, prepare_training
    from lrrobust.training.ranks import joined_ranks

    folder = out if out is not None else Path("reports/training") / model
    request = TrainingRequest(
        model,
        recipe,
        data,
        folder,
        tuple(evaluate_on or ()),
        name,
        device,
        initial_weights,
        workers,
        precision,
        stop_after,
    )
    with joined_ranks(choose_device(device)) as (ranks, own_device):
        if not ranks.is_first:
            training, _ = prepare_training(request, None, ranks, own_device)
            training.run()
            return
        with scanning("decoding images") as on_scan:
            training, evaluation_sets = prepare_training(request, on_scan, ranks, own_device)
        with TrainingProgress(training) as progress:
            training.run(progress.on_step, progress.on_epoch)
    print_weights(training.export(name, evaluation_sets, note))
    plot_learning_curves({model: folder / "log.csv"}, folder / "learning_curve")


@app.command()
def average(
    weights: Annotated[list[Path], typer.Argument(help="Files that `lrrobust train` wrote, of one network.")],
    data: Annotated[
        str, typer.Option(help="The images of the training, for statistics of batch normalisation, and held-out accuracy.")
    ],
    share: Annotated[
        Optional[list[float]],
        typer.Option(
            "--share", help="Weight of each file in the mean, in order: above 0, divided by their sum.", show_default="alike"
        ),
    ] = None,
    evaluate_on: _EvaluateOn = None,
    name: Annotated[str, typer.Option(help="Name of the weights.")] = "AVERAGE",
    note: _Note = "",
    out: Annotated[Path, typer.Option(help="Folder of the file.")] = Path("reports/training"),
) -> None:
    """Average weights of trainings that went on from one another.

    Their mean is often better than each of them.
    """
    from lrrobust.console.products import print_weights
    from lrrobust.console.progress import scanning
    from lrrobust.train import average_trained

    with scanning("decoding images") as on_scan:
        path = average_trained(weights, share or (), data, name, out, evaluate_on or (), note, on_scan)
    print_weights(path)


@app.command()
def bench(
    what: Annotated[
        Optional[list[str]],
        typer.Argument(help="operation, gradient-step, attack-loop, harness, sharing, store, report; all if none."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds in which everything is timed once.")] = 5,
    budget: Annotated[
        float,
        typer.Option(
            min=0,
            help="About how many seconds the rounds of a benchmark may take: what is slow sits some out, but is timed twice.",
        ),
    ] = 120,
    n: Annotated[int, typer.Option("--n", min=1, help="Images that attack-loop and harness take.")] = 32,
    model: Annotated[
        Optional[list[str]],
        typer.Option("--model", "-m", help="Models to attack; repeatable.", show_default="resnet50"),
    ] = None,
    attack: Annotated[str, typer.Option("--attack", "-a", help="Attack to time, of the PGD family.")] = "pgd",
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Images to attack.")] = "photos",
    image_size: Annotated[
        Optional[list[int]],
        typer.Option(
            min=1, help="Side of the images in pixels; repeatable.", show_default="gradient-step: 64 and 224; else the models'"
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Images passed through the model at once.",
            show_default=f"operation: 8; gradient-step: 4 of 224 pixels, 32 of 64; else {DEFAULT_BATCH_SIZE}",
        ),
    ] = None,
    threads: Annotated[
        Optional[int], typer.Option(min=1, max=1024, help="Threads of the CPU.", show_default="as torch")
    ] = None,
    device: _Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("reports/bench"),
) -> None:
    """Time the operation, gradient steps, attack loops and more.

    operation: the op's backends, shifted slices and a 3x3 convolution. gradient-step: of the networks. attack-loop: the attack
    beside torchattacks and Foolbox. harness: an evaluation beside a bare loop that makes the same passes. sharing: one
    evaluation by one process and by two; it fails where a bit of the rows differs. store: what 1000 processes, 50,000 images
    and 20 attacks leave on disk, and how long reading takes. report: making one of large runs.

    Ctrl-C ends a benchmark early: what was measured until then is printed, and written under another name.
    """
    import torch

    from lrrobust.bench.suites import BENCHES, BenchRequest, find_bench
    from lrrobust.console.products import print_bench
    from lrrobust.console.progress import bench_progress
    from lrrobust.processes import choose_device

    chosen = {name: find_bench(name) for name in what or BENCHES}
    if threads is not None:
        torch.set_num_threads(threads)
    for name, measure in chosen.items():
        with _models_on_stderr(), bench_progress(name) as on_turn:
            request = BenchRequest(
                repeats,
                choose_device(device),
                budget,
                n,
                tuple(model or ["resnet50"]),
                attack,
                dataset,
                tuple(image_size) if image_size else None,
                batch_size,
                on_turn,
            )
            try:
                result = measure(request)
            except KeyboardInterrupt as cause:
                raise Interrupted(cause, f"nothing of {name} was measured yet") from None
        print_bench(name, result, request, out)
        if result.interruption is not None:
            raise Interrupted(result.interruption, f"{name} was not finished")


@app.command()
def crosscheck(
    model: Annotated[list[str], typer.Option("--model", "-m", help="As for eval; repeatable.")],
    attack: Annotated[
        Optional[list[str]], typer.Option("--attack", "-a", help="As for eval; repeatable.", show_default="pgd")
    ] = None,
    suite: Annotated[Optional[list[str]], typer.Option(help="As for eval; repeatable.")] = None,
    peer: Annotated[
        Optional[list[str]],
        typer.Option(help="foolbox, autoattack, torchattacks or adv-lib; repeatable.", show_default="all that are installed"),
    ] = None,
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="As for eval.")] = "photos",
    n: Annotated[int, typer.Option(min=1, help="Images, drawn by --seed.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the subset, and of all random starts.")] = 0,
    weights: Annotated[Optional[list[str]], typer.Option(help="As for eval; once for each --model.")] = None,
    classes: Annotated[Optional[str], typer.Option(help="As for eval.")] = None,
    input_size: _InputSize = None,
    eps: Annotated[
        Optional[list[str]], typer.Option(help="Budgets instead of the attack's; peers attack at each anew.")
    ] = None,
    peer_eps: Annotated[
        Optional[list[str]],
        typer.Option(help="Which of these to compare at; each takes the peers a run of theirs.", show_default="all"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images passed through the model at once.")] = DEFAULT_BATCH_SIZE,
    device: _Device = "auto",
    runs: Annotated[Path, typer.Option(help="Our own runs get a folder in here, as with eval.")] = Path("reports/runs"),
    out: Annotated[Path, typer.Option(help="Folder of the tables (CSV).")] = Path("reports/crosscheck"),
) -> None:
    """Run the same attacks through other libraries, beside ours.

    Shows robust accuracies of all.

    Ours is an ordinary run. What the others return is judged as ours is; what they claim is shown too. AutoAttack's
    standard evaluation is compared with the worst case of all attacks given of its norm.
    """
    from lrrobust.attacks.suite import load_suite

    attacks = tuple([*(attack or []), *(suite or [])]) or ("pgd",)
    load_suite(attacks)

    from lrrobust.console.products import print_crosscheck
    from lrrobust.console.progress import crosscheck_progress
    from lrrobust.crosscheck import choose_budgets, choose_peers, crosscheck_evaluation
    from lrrobust.run import EvaluationRequest

    peers, missing = choose_peers(peer or ())
    request = EvaluationRequest(
        models=tuple(model),
        attacks=attacks,
        weights=tuple(weights or ()),
        dataset=dataset,
        classes=classes,
        input_size=input_size,
        n=n,
        seed=seed,
        eps=_split(eps),
        batch_size=batch_size,
        device=device,
        out=runs,
    )
    evaluations = _prepare(request)
    specs = [task.spec for task in evaluations[0].tasks]
    budgets = None if not peer_eps else choose_budgets(_split(peer_eps), specs)
    _run_all(evaluations)
    for evaluation in evaluations:
        with _models_on_stderr(), crosscheck_progress() as on_attack:
            comparison = crosscheck_evaluation(evaluation, peers, on_attack, budgets)
        print_crosscheck(evaluation, comparison, missing, out / f"{evaluation.folder.name}.csv")


@app.command()
def models() -> None:
    """List the networks and trained weights of the package."""
    from lrrobust.console.listings import print_models

    print_models()


@app.command()
def attacks(
    name: Annotated[
        Optional[str], typer.Argument(help="Show this one: a name in the list, or a YAML file.", show_default="all")
    ] = None,
) -> None:
    """List attacks and suites, or print all settings of one.

    What is printed is a file to begin yours with.
    """
    from lrrobust.console.listings import print_attacks, print_settings

    if name is None:
        print_attacks()
    else:
        print_settings(name)


for _command in app.registered_commands:
    # typer would break lines where docstrings do, besides where the terminal ends.
    _paragraphs = inspect.cleandoc(_command.callback.__doc__ or "").split("\n\n")  # none under python -OO
    _command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs)


def run(arguments: list[str]) -> int:
    """Runs one command line; see `run_command`."""
    return run_command(app, arguments)


def main() -> None:
    """Entry point of the console script."""
    raise_on_signals()
    settle_process()
    # A closed standard output or error is none at all to Python, and nobody listens: results are in files.
    sys.stdout = StandardOutput(sys.stdout or open(os.devnull, "w"))
    sys.stderr = Unheard(sys.stderr or open(os.devnull, "w"))
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    # Of what cameras wrote wrongly beside the pixels, which no pixel depends on.
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    sys.exit(run(sys.argv[1:]))
