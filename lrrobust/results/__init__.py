"""What a run leaves on disk: the columns of its rows, and the folder that holds them."""

from lrrobust.results.examples import Example, example_count
from lrrobust.results.schema import OUTCOMES, SCHEMA, SCHEMA_VERSION, distances, rows_to_table
from lrrobust.results.store import Run, RunStore, find_runs, fingerprint_of, load_examples, load_run, manifest_value, write_file

__all__ = [
    "OUTCOMES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Example",
    "Run",
    "RunStore",
    "distances",
    "example_count",
    "find_runs",
    "fingerprint_of",
    "load_examples",
    "load_run",
    "manifest_value",
    "rows_to_table",
    "write_file",
]
