"""The columns of a result: one row for each image, attack and eps.

Every column carries its unit and meaning as metadata, which travels inside each Parquet file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

#: Raised whenever a column is added, dropped or changes its meaning.
SCHEMA_VERSION = 2

NORMS = ("linf", "l2", "l1")

#: What became of an image:
#: wrong_when_clean       misclassified without any attack, hence not attacked;
#: broken                 a verified adversarial image lies within eps;
#: broken_at_smaller_eps  one was found at a smaller eps already, hence not attacked again;
#: broken_by_earlier_attack  an earlier attack of the suite found one, hence not attacked again;
#: robust                 nothing misclassified was proposed;
#: rejected               only images outside ball or box were proposed: the attack failed.
OUTCOMES = ("wrong_when_clean", "broken", "broken_at_smaller_eps", "broken_by_earlier_attack", "robust", "rejected")

#: The outcomes that come with a verified adversarial image, and so with its distances.
_OUTCOMES_WITH_DISTANCE = ("broken", "broken_at_smaller_eps")
_BROKEN_OUTCOMES = ("wrong_when_clean", *_OUTCOMES_WITH_DISTANCE, "broken_by_earlier_attack")


def schema_without_nulls(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def _column(name: str, kind: pa.DataType, unit: str, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"unit": unit, "meaning": meaning})


SCHEMA = pa.schema(
    [
        _column("index", pa.int64(), "position from 0", "place of the image in the dataset listing"),
        _column("key", pa.string(), "name", "stable name of the image, as in its file name"),
        _column("label", pa.int32(), "class number", "true class"),
        _column("wnid", pa.string(), "WordNet id", "true class, independent of any numbering"),
        _column("attack", pa.string(), "name", "name of the attack in the suite"),
        _column("norm", pa.string(), "one of " + ", ".join(NORMS), "norm that bounds the perturbation"),
        _column(
            "eps",
            pa.float64(),
            "pixel units of [0, 1]",
            "radius of the ball; infinity for the unbounded row of a minimal-norm attack",
        ),
        _column("clean_prediction", pa.int32(), "class number", "prediction for the clean image"),
        _column("is_clean_correct", pa.bool_(), "yes or no", "the clean image is classified correctly"),
        _column(
            "adversarial_prediction",
            pa.int32(),
            "class number",
            "prediction for the proposed image; null when nothing was proposed",
            nullable=True,
        ),
        _column(
            "is_broken",
            pa.bool_(),
            "yes or no",
            "counts against robust accuracy: wrong when clean, or a verified adversarial image within eps",
        ),
        _column("outcome", pa.string(), "one of " + ", ".join(OUTCOMES), "what became of the image"),
        _column(
            "linf_distance",
            pa.float64(),
            "pixel units of [0, 1]",
            "largest change of a value in the verified adversarial image; null without one",
            nullable=True,
        ),
        _column(
            "l2_distance",
            pa.float64(),
            "pixel units of [0, 1]",
            "Euclidean length of the perturbation of the verified adversarial image; null without one",
            nullable=True,
        ),
        _column(
            "l1_distance",
            pa.float64(),
            "pixel units of [0, 1]",
            "sum of all absolute changes in the verified adversarial image; null without one",
            nullable=True,
        ),
        _column(
            "is_broken_quantized",
            pa.bool_(),
            "yes or no",
            "a verified adversarial image rounded to 8 bits inside ball and box is still misclassified, one of this "
            "attack or of an earlier one whose survivors it attacks; null without an adversarial image of this attack, "
            "or when this was not asked for",
            nullable=True,
        ),
        _column(
            "clean_margin",
            pa.float64(),
            "logits",
            "logit of the true class minus the largest other, clean image",
        ),
        _column(
            "adversarial_margin",
            pa.float64(),
            "logits",
            "logit of the true class minus the largest other, proposed image; null when nothing was proposed",
            nullable=True,
        ),
        _column("wall_s", pa.float64(), "seconds", "share of this image in the time of its chunk"),
        _column(
            "forward_passes",
            pa.int64(),
            "images through the network",
            "forward passes spent on this image; null when not counted",
            nullable=True,
        ),
        _column(
            "backward_passes",
            pa.int64(),
            "images through the network",
            "backward passes spent on this image; null when not counted",
            nullable=True,
        ),
    ]
)


def texts(column: pd.Series) -> pd.Series:
    """A column of few different texts as Python's own: quick to group by, each made once and shared by its rows."""
    codes, different = pd.factorize(column, use_na_sentinel=False)
    return pd.Series(np.asarray(different, dtype=object)[codes], index=column.index, dtype=object)


def distances(rows: pd.DataFrame) -> np.ndarray:
    """The distance of each row's adversarial image in the row's own norm, float64; infinity where there is none."""
    found = np.full(len(rows), np.inf)
    for norm in NORMS:
        is_norm = (rows["norm"] == norm).to_numpy(bool)
        if is_norm.any():
            found[is_norm] = rows.loc[is_norm, f"{norm}_distance"].to_numpy(np.float64, na_value=np.inf)
    return found


def breaking_eps(rows: pd.DataFrame) -> np.ndarray:
    """The smallest eps at which each row proves its image broken, float64: 0 where it is wrong when clean, else infinity."""
    eps, is_broken = rows["eps"].to_numpy(np.float64), rows["is_broken"].to_numpy(bool)
    # A distance may exceed the eps it was accepted at by the tolerance of the ball.
    found = np.where(is_broken, np.minimum(eps, distances(rows)), np.inf)
    return np.where(rows["is_clean_correct"].to_numpy(bool), found, 0.0)


def rows_to_table(rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> pa.Table:
    """Rows as a table of `SCHEMA`, or a refusal: nothing is guessed, dropped or filled in.

    Args:
        rows: one mapping a row, or one mapping from column name to values (arrays or lists of one
            length). `None` is null; NaN is a number and is not.

    Raises:
        ValueError: a column is unknown, missing, of another type or null where it must not be; an
            outcome or norm is unknown; columns contradict each other. The message names the column,
            and the first offending row where there is one.
    """
    columns = rows if isinstance(rows, Mapping) else _columns_of(rows)
    _check_names(columns, "the table")
    arrays = [_array_of(field, columns[field.name]) for field in SCHEMA]
    lengths = {field.name: len(array) for field, array in zip(SCHEMA, arrays)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one length, got {lengths}")
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    check_values(table)
    return table


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    for position, row in enumerate(rows):
        _check_names(row, f"row {position}")
    return {name: [row[name] for row in rows] for name in SCHEMA.names}


def _check_names(names: Mapping[str, Any], where: str) -> None:
    unknown = sorted(set(names) - set(SCHEMA.names))
    missing = sorted(set(SCHEMA.names) - set(names))
    if unknown or missing:
        raise ValueError(f"{where} must have the columns of the schema, got unknown {unknown}, missing {missing}")


def _array_of(field: pa.Field, values: Any) -> pa.Array:
    # Inferred first: given the type, pyarrow would silently cut [1.5] to the integer 1.
    try:
        array = pa.array(values, from_pandas=False)
        if not _is_acceptable(array.type, field.type):
            raise pa.ArrowTypeError(f"got {array.type}")
        array = array.cast(field.type)
    except pa.ArrowException as error:
        raise ValueError(f"column {field.name!r} must hold {field.type}: {error}") from None
    if array.null_count and not field.nullable:
        raise ValueError(f"column {field.name!r} must not hold nulls, got {array.null_count}")
    return array


def _is_acceptable(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_null(found):
        return True
    if pa.types.is_floating(wanted):
        return pa.types.is_floating(found) or pa.types.is_integer(found)
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(found)
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return found == wanted


def check_values(table: pa.Table) -> None:
    """Raises ValueError where values of a table of `SCHEMA` contradict each other, or are not what their columns hold."""
    outcome, norm, eps = table["outcome"], table["norm"], table["eps"]
    _check_all(_is_in(outcome, OUTCOMES), outcome, f"outcome must be one of {', '.join(OUTCOMES)}")
    _check_all(_is_in(norm, NORMS), norm, f"norm must be one of {', '.join(NORMS)}")
    _check_all(pc.greater_equal(eps, 0.0), eps, "eps must be zero or more")

    is_wrong = pc.equal(outcome, "wrong_when_clean")
    has_distance = _is_in(outcome, _OUTCOMES_WITH_DISTANCE)
    _check_all(
        pc.not_equal(table["is_clean_correct"], is_wrong),
        outcome,
        "outcome must be wrong_when_clean exactly where is_clean_correct is false",
    )
    _check_all(
        pc.equal(table["is_broken"], _is_in(outcome, _BROKEN_OUTCOMES)),
        outcome,
        f"is_broken must be true exactly for the outcomes {', '.join(_BROKEN_OUTCOMES)}",
    )
    for name in (f"{norm}_distance" for norm in NORMS):
        _check_all(
            pc.equal(pc.is_valid(table[name]), has_distance),
            outcome,
            f"{name} must be given exactly for the outcomes {', '.join(_OUTCOMES_WITH_DISTANCE)}",
        )
        is_length = pc.and_(pc.is_finite(table[name]), pc.greater_equal(table[name], 0.0))
        _check_all(pc.fill_null(is_length, True), table[name], f"{name} must be finite and zero or more")
    quantized = table["is_broken_quantized"]
    _check_all(
        pc.or_(pc.is_null(quantized), has_distance), outcome, "is_broken_quantized must be null without an adversarial image"
    )


def _is_in(column: pa.ChunkedArray, values: tuple[str, ...]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values))


def _check_all(is_right: pa.ChunkedArray, column: pa.ChunkedArray, rule: str) -> None:
    row = pc.index(is_right, False).as_py()
    if row >= 0:
        raise ValueError(f"{rule}, got {column[row].as_py()!r} in row {row}")
