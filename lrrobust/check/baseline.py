"""The baseline: what an evaluation found, image by image, small enough to commit and review.

A JSON file of one evaluation request and its results. What a result depends on is stored in the open, so that a
difference can be named: `protocol` (attacks, data set, subset, seed, chunk size, versions of the attack code) is shared
by all models; each model has its weights, code, classes and preprocessing. `rule` says when a check fails, so that the
rule is reviewed with the numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lrrobust.errors import BaselineError, ConfigError, StoreError
from lrrobust.mistakes import describe_mistake, dotted
from lrrobust.norm import Norm
from lrrobust.results import Run, fingerprint_of, write_file
from lrrobust.results.files import read_file

#: Raised whenever a field is added, dropped or changes its meaning. Those of version 1 have no clean accuracy.
BASELINE_SCHEMA_VERSION = 2

#: 50,000 images under 100 attacks and eps take 1.3 MB.
MAX_FILE_BYTES = 64 * 1024 * 1024

#: What a manifest says about a session; all else decides rows, and is part of the comparison.
_SESSION_KEYS = {
    "fingerprint",
    "created_at",
    "command",
    "class_names",
    "provenance",
    "sessions",
    "request",
    "position",
    "copies",
}

#: What it says about one model, and no other.
_MODEL_KEYS = {"model", "training"}

Text = Annotated[str, Field(max_length=1000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of the records: frozen, strict, no unknown fields, no infinities or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Rule(Record):
    """When a check fails."""

    significance: Annotated[float, Field(gt=0, lt=1)] = 0.025
    """Bound on the probability that a check fails though no model has become less robust. The usual level of one-sided
    tests; under 39 comparisons, as the suite `standard` has, it still notices 11 lost images."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Smallest fall of robust accuracy that fails a check; a fraction, as accuracies are."""
    weights_may_change: bool = False
    """The model is what is under test: other weights or code are compared, and said. Otherwise they make it
    another comparison, which is refused."""

    def replaced(
        self, significance: float | None = None, floor: float | None = None, weights_may_change: bool | None = None
    ) -> Rule:
        """The rule with the settings that are given; ConfigError where one is out of range."""
        given = {"significance": significance, "floor": floor, "weights_may_change": weights_may_change}
        try:
            return Rule(**{**self.model_dump(), **{key: value for key, value in given.items() if value is not None}})
        except ValidationError as error:
            mistake = error.errors(include_url=False)[0]
            option = mistake["loc"][0]
            found = f"{100 * mistake['input']:g} points" if option == "floor" else mistake["input"]
            bounds = "a number of points from 0 to below 100" if option == "floor" else "a probability between 0 and 1"
            raise ConfigError(f"--{option}: expected {bounds}, found {found}") from None


class Measurement(Record):
    """One model under one attack at one eps."""

    attack: Text
    norm: Norm
    eps: Annotated[float, Field(ge=0)] | None
    """Pixel units of [0, 1]; None: any distance (JSON has no infinity)."""
    n: Annotated[int, Field(ge=1)]
    robust_accuracy: Annotated[float, Field(ge=0, le=1)]
    robust: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]
    """Bitmap in hexadecimal: images in the order of the data set, first image in the highest bit of the first byte,
    1 where the image is robust, zeros after the last."""

    @classmethod
    def of(cls, attack: str, norm: str, eps: float, is_robust: np.ndarray) -> Measurement:
        """From bool (n,)."""
        bitmap = np.packbits(is_robust).tobytes().hex()
        accuracy = float(is_robust.mean())
        return cls(
            attack=attack,
            norm=norm,
            eps=None if math.isinf(eps) else eps,
            n=len(is_robust),
            robust_accuracy=accuracy,
            robust=bitmap,
        )

    @property
    def key(self) -> tuple[str, str, float]:
        return self.attack, self.norm, math.inf if self.eps is None else self.eps

    def is_robust(self) -> np.ndarray:
        """Bool (n,)."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.robust), dtype=np.uint8), count=self.n).astype(bool)

    @model_validator(mode="after")
    def _check_bitmap(self) -> Measurement:
        size_bytes, expected = len(self.robust) // 2, math.ceil(self.n / 8)
        if size_bytes != expected:
            raise _mistake(f"the bitmap must have {expected} bytes for {self.n} images, has {size_bytes}")
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.robust), dtype=np.uint8))
        if bits[self.n :].any():
            raise _mistake(f"the bitmap has bits beyond its {self.n} images")
        count = int(bits.sum())
        if not math.isclose(self.robust_accuracy, count / self.n, abs_tol=1e-9):
            raise _mistake(f"robust_accuracy is {self.robust_accuracy}, the bitmap says {count} of {self.n} images")
        return self


class ModelBaseline(Record):
    """One model and its measurements."""

    model: dict[str, JsonValue]
    """As in a run's manifest: name, weights, hashes, classes, preprocessing."""
    clean_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    """For information, no check rests on it; None: not known."""
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1)]

    @property
    def name(self) -> str:
        return str(self.model["name"])

    @model_validator(mode="after")
    def _check_model(self) -> ModelBaseline:
        for key in ("name", "state_sha256", "code_sha256"):
            if not isinstance(self.model.get(key), str):
                raise _mistake(f"model must hold {key}")
        if len({measurement.key for measurement in self.measurements}) < len(self.measurements):
            raise _mistake("an attack and eps is measured twice")
        most = max(measurement.robust_accuracy for measurement in self.measurements)
        if self.clean_accuracy is not None and self.clean_accuracy < most - 1e-9:
            raise _mistake(f"clean_accuracy is {self.clean_accuracy}, less than a robust accuracy of {most}")
        return self


class Baseline(Record):
    """The file."""

    schema_version: Literal[1, 2] = BASELINE_SCHEMA_VERSION
    rule: Rule
    request: dict[str, JsonValue]
    """The evaluation as it was asked for, to be done again; paths are as the user gave them."""
    config_sha256: Sha256
    """Of `protocol`."""
    protocol: dict[str, JsonValue]
    """What decides the rows, models aside."""
    made_with: dict[str, JsonValue]
    """Software and machine, for information; not compared."""
    models: Annotated[tuple[ModelBaseline, ...], Field(min_length=1)]
    """In the order of the request."""

    @model_validator(mode="after")
    def _check_whole(self) -> Baseline:
        if self.config_sha256 != fingerprint_of(self.protocol):
            raise _mistake("protocol does not have the hash config_sha256: one was edited without the other")
        dataset = self.protocol.get("dataset")
        n = dataset.get("n") if isinstance(dataset, dict) else None
        if not isinstance(n, int):
            raise _mistake("protocol must hold dataset.n")
        for place, of_model in enumerate(self.models):
            for measurement in of_model.measurements:
                if measurement.n != n:
                    raise _mistake(f"models.{place} has a measurement of {measurement.n} images, the data set has {n}")
        return self


def build_baseline(runs: Sequence[Run], rule: Rule) -> Baseline:
    """The baseline that complete runs of one evaluation request make.

    Raises:
        StoreError: a run is not complete, or was written by a version that did not keep the request.
        BaselineError: the runs are not those of one request.
    """
    runs = in_request_order(runs)
    manifest = runs[0].manifest
    protocol = protocol_of(manifest)
    for run in runs[1:]:
        if protocol_of(run.manifest) != protocol:
            raise BaselineError(f"{runs[0].folder} and {run.folder} saw different images or attacks: evaluate both again")
    models = tuple(
        ModelBaseline(
            model=run.manifest["model"], clean_accuracy=clean_accuracy(run), measurements=tuple(m for m, _ in measure(run))
        )
        for run in runs
    )
    provenance = manifest.get("provenance") or {}
    made_with = {key: provenance.get(key) for key in ("lrrobust", "python", "platform", "device", "versions")}
    return Baseline(
        rule=rule,
        request=_request_of(runs),
        config_sha256=fingerprint_of(protocol),
        protocol=protocol,
        made_with=made_with,
        models=models,
    )


def in_request_order(runs: Sequence[Run]) -> list[Run]:
    """The runs of one request, one for each of its models or, without surrogates, for some of them.

    Raises:
        StoreError, BaselineError: as `build_baseline`.
    """
    for run in runs:
        if not run.is_complete:
            raise StoreError(f"{run.folder} is not complete: repeat its `lrrobust eval` command, it goes on from there")
        if not (run.manifest.get("request") or {}).get("models") or "position" not in run.manifest:
            raise StoreError(
                f"{run.folder} does not say how it was asked for (in Python, or an older lrrobust), so that it cannot be "
                "asked for again: make it with `lrrobust eval`"
            )
    ordered = sorted(runs, key=lambda run: run.manifest["position"])
    first = ordered[0]
    for run in ordered[1:]:
        if run.manifest["request"] != first.manifest["request"]:
            raise BaselineError(f"{first.folder} and {run.folder} are of different `lrrobust eval` commands: one baseline each")
    request, found = first.manifest["request"], [run.manifest["position"] for run in ordered]
    if len(request.get("surrogates") or ()) > 1:
        raise BaselineError("a baseline is of one --surrogate at most: evaluate each by itself, one baseline each")
    expected = range(len(request["models"]))
    is_part = not request.get("surrogates") and len(set(found)) == len(found) and set(found) <= set(expected)
    if found != list(expected) and not is_part:
        raise BaselineError(
            f"the command evaluated {len(expected)} models ({', '.join(request['models'])}), got the runs of {len(ordered)}: "
            "give the run of each once"
        )
    return ordered


def _request_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What asks for these runs of one request again, which may be of some of its models only."""
    request = dict(runs[0].manifest["request"])
    for key in ("models", "weights"):
        if given := request.get(key):
            request[key] = [given[run.manifest["position"]] for run in runs] if not request.get("surrogates") else given
    return request


def protocol_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What of a manifest decides the rows, the model aside."""
    protocol = {key: value for key, value in manifest.items() if key not in _SESSION_KEYS | _MODEL_KEYS}
    # Which parts there are follows from the rest.
    protocol["plan"] = {"chunk_size": manifest["plan"]["chunk_size"]}
    return protocol


def measure(run: Run) -> list[tuple[Measurement, Any]]:
    """Each attack and eps of a run with its rows (a DataFrame), ordered as the images of the data set."""
    found = []
    for (attack, norm, eps), rows in run.rows.groupby(["attack", "norm", "eps"], sort=False):
        rows = rows.sort_values("index")
        found.append((Measurement.of(attack, norm, eps, ~rows["is_broken"].to_numpy(bool)), rows))
    return found


def clean_accuracy(run: Run) -> float:
    """Share of a run's images that are correct without attack."""
    return float(run.rows.drop_duplicates("index")["is_clean_correct"].mean())


def read_baseline(path: Path) -> Baseline:
    """Reads and checks a baseline.

    Raises:
        BaselineError: it is not there, cannot be read, or is not a baseline; one line says what is wrong where.
    """
    try:
        content = read_file(path, MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise BaselineError(
            f"no baseline {path}: make one with `lrrobust eval ...`, then `lrrobust check {path} --update --run FOLDER`"
        ) from None
    except OSError as error:
        raise BaselineError(f"baseline {path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise BaselineError(f"baseline {path}: expected at most {MAX_FILE_BYTES} bytes, found more")
    try:
        baseline = Baseline.model_validate_json(content)
        json.loads(content, object_pairs_hook=_refuse_repeats)
        return baseline
    except _RepeatedKey as error:
        message, where = str(error), ""
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        # Another version explains everything else that does not fit.
        mistake = next((each for each in mistakes if each["loc"][:1] == ("schema_version",)), mistakes[0])
        message, where = describe_mistake(mistake), dotted(mistake["loc"])
    raise BaselineError(
        f"baseline {path}: {where + ': ' if where else ''}{message[:300]}; restore the file, "
        "or rewrite it with --update --run FOLDER"
    )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes the file, or what a link there leads to, whole or not at all, one line for each value, for reviews of changes.

    Raises:
        StoreError: it cannot be written.
    """
    write_file(
        Path(os.path.realpath(path)),
        (json.dumps(baseline.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n").encode(),
    )


class _RepeatedKey(Exception):
    """Of two values for one key, a review may see the one and a reader take the other."""


def _refuse_repeats(pairs: Sequence[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise _RepeatedKey(f"{repeated[0]!r} stands twice in one object")


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("baseline", "{message}", {"message": message})
