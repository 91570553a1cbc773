"""Ours and theirs, image by image, under one judge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from pydantic_core import PydanticCustomError
from torch import nn

from lrrobust.attacks.specs import AttackSpec
from lrrobust.crosscheck.peer import PEERS, Peer, PeerAttack
from lrrobust.determinism import deterministic_float32, seeded
from lrrobust.eps import parse_eps
from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.evaluation.judge import Judge
from lrrobust.frozen import frozen
from lrrobust.results import load_run
from lrrobust.stats.paired import mcnemar_p_value, paired_difference_interval
from lrrobust.threat import Norm, ThreatModel, distance

if TYPE_CHECKING:
    from lrrobust.planned_evaluation import Evaluation

#: Told of library, attack, norm and eps (infinity: every budget at once) before a call that may take long.
OnAttack = Callable[[str, str, str, float], None]

#: Our attacks of one norm together, as a peer's ensemble is compared with.
WORST_CASE = "worst case"


@dataclass(frozen=True)
class Comparison:
    """What `crosscheck` found.

    Attributes:
        table: one row for each attack, budget and library; the columns are explained there.
        notes: one line for each library or attack that could not take part, with the reason.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Contest:
    """One of our attacks, or all of a norm, and what a peer has to set against it."""

    attack: str
    norm: Norm
    ladder: tuple[float, ...]
    is_unbounded: bool
    starts: int
    ours: pd.DataFrame
    propose: PeerAttack


def choose_peers(names: Sequence[str]) -> tuple[list[Peer], list[str]]:
    """The libraries of these names, all that are known where none is named; and why some cannot take part.

    Raises:
        UnknownNameError: no such library is known.
        ConfigError: none of them is installed.
    """
    for name in names:
        if name not in PEERS:
            raise UnknownNameError("library", name, PEERS)
    chosen = [PEERS[name] for name in dict.fromkeys(names)] or list(PEERS.values())
    missing = [reason for peer in chosen if (reason := peer.why_not()) is not None]
    if len(missing) == len(chosen):
        raise ConfigError(f"there is nothing to compare with: {'; '.join(missing)}")
    return [peer for peer in chosen if peer.why_not() is None], missing


def choose_budgets(texts: Sequence[str], specs: Sequence[AttackSpec]) -> frozenset[float]:
    """The budgets that these texts, such as "1/255", name.

    Raises:
        ConfigError: one is no number, or no attack has it on its ladder.
    """
    ladder = {eps for spec in specs for eps in spec.eps}
    chosen = set()
    for text in texts:
        try:
            eps = parse_eps(text)
        except PydanticCustomError as error:
            raise ConfigError(f"{text}: {error.message()}") from None
        if eps not in ladder:
            known = ", ".join(f"{255 * known:g}/255 ({known:g})" for known in sorted(ladder))
            raise ConfigError(f"expected budgets that our attacks have, {known}, found {text}")
        chosen.add(eps)
    return frozenset(chosen)


def crosscheck_evaluation(
    evaluation: Evaluation,
    peers: Sequence[Peer],
    on_attack: OnAttack | None = None,
    budgets: Collection[float] | None = None,
) -> Comparison:
    """`crosscheck` for an evaluation that has run, on its device and in its batches."""
    images, labels = evaluation.images.load(range(len(evaluation.images)))
    return crosscheck(
        evaluation.classifier.module.to(evaluation.device),
        len(evaluation.classifier.classes),
        images.to(evaluation.device),
        labels.to(evaluation.device),
        evaluation.images.indices,
        list(dict.fromkeys(task.spec for task in evaluation.tasks)),
        load_run(evaluation.folder).rows,
        peers,
        batch_size=evaluation.manifest["plan"]["batch_size"],
        seed=evaluation.manifest["seed"],
        on_attack=on_attack,
        budgets=budgets,
    )


def crosscheck(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    indices: Sequence[int],
    specs: Sequence[AttackSpec],
    ours: pd.DataFrame,
    peers: Sequence[Peer],
    *,
    batch_size: int,
    seed: int = 0,
    on_attack: OnAttack | None = None,
    budgets: Collection[float] | None = None,
) -> Comparison:
    """Runs the counterparts of our attacks in other libraries, and compares which images break.

    A peer attacks the images that are correct when clean, in batches, with the settings of our attack, in float32;
    restarts are new calls on all of them with other random numbers. What it returns is judged as our own proposals
    are, and by the same rules: what is broken at one budget is broken at every larger one, and what was found at a
    large budget counts at every budget it lies within. So the judged robust accuracy of a peer falls with eps, and
    the one that it claims, which is taken as it comes, need not.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, num_classes), on the device of `images`.
        labels: (N,) int64.
        indices: by which numbers the rows call the images.
        specs: our attacks.
        ours: their rows for these images, as a run stores them.
        peers: installed libraries.
        batch_size: images passed through the model at once.
        seed: of the peers' random numbers.
        on_attack: told what comes next.
        budgets: those of our attacks at which they are compared; all if None. A peer attacks at each anew.

    Returns:
        A table with `attack`, `norm`, `eps` (pixel units of [0, 1]), `peer` and its `version`; `n`;
        `robust_accuracy` of ours, `peer_robust_accuracy` under our judge, and `peer_claimed`, by the library's own
        count, as fractions of all images; `only_ours` and `only_peer`, the images broken by one alone;
        `difference`, the robust accuracy that ours leaves less that of the peer, with the limits `low` and `high` of
        its 95 % score interval; `p_value`, two-sided exact McNemar; `peer_wall_s`, null where a call served several
        budgets and this is not the first.

        A library that fails gets a note and no row: a crash is no robustness.
    """
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    with frozen(model), deterministic_float32():
        judge = Judge(model, num_classes, batch_size)
        keys = [str(position) for position in range(len(images))]
        is_correct = judge.predict(images, labels, keys).label == labels
        standing = is_correct.nonzero().squeeze(1)
        for peer in peers:
            contests, without = _contests(peer, specs, ours, budgets)
            notes += without
            for contest in contests:
                on_call = partial(on_attack or (lambda *_: None), peer.name, contest.attack, contest.norm)
                try:
                    found = _attack(judge, images, labels, standing, contest, seed, on_call)
                    rows += _rows(peer, contest, indices, is_correct, *found)
                except Exception as error:  # of any type: it is other people's code
                    notes.append(f"{peer.name} failed at {contest.attack}: {_in_brief(error)}")
    return Comparison(pd.DataFrame(rows), tuple(notes))


def _contests(
    peer: Peer, specs: Sequence[AttackSpec], ours: pd.DataFrame, budgets: Collection[float] | None
) -> tuple[list[_Contest], list[str]]:
    """What a peer can be compared in; and notes on what it cannot."""
    try:
        adapter = peer.load()
    except Exception as error:  # of any type: it is other people's code
        return [], [f"{peer.name} cannot be imported: {_in_brief(error)}"]
    contests, without = [], []
    for spec in specs:
        # Rows of an attack that met only what earlier ones had left do not stand for it alone.
        # Nor do peers average over a randomised model.
        propose = None if spec.survivors_only or spec.eot_iter > 1 else adapter.find_attack(spec)
        if propose is None:
            without.append(spec.name)
            continue
        rows = ours[ours["attack"] == spec.name]
        ladder, starts = _ladder(spec.eps, budgets), getattr(spec, "restarts", 1)
        contests.append(_Contest(spec.name, spec.norm, ladder, spec.minimises, starts, rows, propose))
    for norm in dict.fromkeys(spec.norm for spec in specs):
        propose = adapter.find_ensemble(norm)
        if propose is None:
            continue
        of_norm = [spec for spec in specs if spec.norm == norm]
        rows = ours[ours["attack"].isin([spec.name for spec in of_norm])]
        # Budgets that all of them have: at others the worst case is of fewer attacks.
        shared = set.intersection(*(set(spec.eps) for spec in of_norm))
        ladder, without = _ladder(sorted(shared), budgets), []
        contests.append(_Contest(WORST_CASE, norm, ladder, False, 1, rows, propose))
    return contests, [f"{peer.name} has no counterpart of {', '.join(without)}"] if without else []


def _ladder(eps: Sequence[float], budgets: Collection[float] | None) -> tuple[float, ...]:
    return tuple(each for each in eps if each > 0 and (budgets is None or each in budgets))


def _in_brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass(frozen=True)
class _Call:
    """What a peer did when it was asked for one budget: from which eps on it claims each image, float64 (N,)."""

    claimed_at: torch.Tensor
    wall_s: float


def _attack(
    judge: Judge,
    images: torch.Tensor,
    labels: torch.Tensor,
    standing: torch.Tensor,
    contest: _Contest,
    seed: int,
    on_call: Callable[[float], None],
) -> tuple[torch.Tensor, list[_Call]]:
    """From which eps on each image is broken by the judge's verdict, float64 (N,); and a call for each budget."""
    breaks_at = torch.full(labels.shape, math.inf, dtype=torch.float64, device=labels.device)
    calls = []
    for eps in (math.inf,) if contest.is_unbounded else contest.ladder:
        on_call(eps)
        claimed_at = torch.full_like(breaks_at, math.inf)
        started = time.perf_counter()
        # Peers draw from the global generators, and some seed them.
        with seeded(images.device, seed), torch.enable_grad():
            for rows in [rows for _ in range(contest.starts) for rows in standing.split(judge.batch_size)]:
                clean, true = images[rows], labels[rows]
                proposal = contest.propose(judge.model, clean.clone(), true.clone(), eps)
                # Some leave the model in training mode.
                judge.model.eval()
                found = proposal.images.detach().to(clean)
                verdict = judge.judge(clean, true, found, ThreatModel(contest.norm, eps), [""] * len(rows))
                # Rounding may carry an image beyond its budget, as far as the judge lets it.
                length = distance(clean, found, contest.norm).clamp_max(eps)
                breaks_at[rows] = torch.minimum(breaks_at[rows], length.where(verdict.is_adversarial, math.inf))
                claim = length if contest.is_unbounded else torch.full_like(length, eps)
                is_claimed = proposal.is_claimed.to(labels.device)
                claimed_at[rows] = torch.minimum(claimed_at[rows], claim.where(is_claimed, math.inf))
        calls.append(_Call(claimed_at, time.perf_counter() - started))
    return breaks_at, calls


def _rows(
    peer: Peer,
    contest: _Contest,
    indices: Sequence[int],
    is_correct: torch.Tensor,
    breaks_at: torch.Tensor,
    calls: Sequence[_Call],
) -> list[dict[str, object]]:
    n, rows = len(indices), []
    for position, eps in enumerate(contest.ladder):
        call = calls[0 if contest.is_unbounded else position]
        at_eps = contest.ours[contest.ours["eps"] == eps]
        by_ours = at_eps.groupby("index")["is_broken"].any().loc[list(indices)].to_numpy()
        by_peer = (~is_correct | (breaks_at <= eps)).cpu().numpy()
        claimed = (~is_correct | (call.claimed_at <= eps)).cpu().numpy()
        only_ours, only_peer = int((by_ours & ~by_peer).sum()), int((by_peer & ~by_ours).sum())
        low, high = paired_difference_interval(only_peer, only_ours, n)
        rows.append(
            {
                "attack": contest.attack,
                "norm": contest.norm,
                "eps": eps,
                "peer": peer.name,
                "version": peer.version,
                "n": n,
                "robust_accuracy": 1 - by_ours.mean(),
                "peer_robust_accuracy": 1 - by_peer.mean(),
                "peer_claimed": 1 - claimed.mean(),
                "only_ours": only_ours,
                "only_peer": only_peer,
                "difference": (only_peer - only_ours) / n,
                "low": float(low),
                "high": float(high),
                "p_value": float(mcnemar_p_value(only_ours, only_peer)),
                "peer_wall_s": math.nan if contest.is_unbounded and position else call.wall_s,
            }
        )
    return rows
