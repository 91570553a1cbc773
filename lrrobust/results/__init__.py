"""What a run leaves on disk: the columns of its rows, and the folder that holds them."""

from lrrobust.results.adversarial import AdversarialImage
from lrrobust.results.examples import Example, example_count
from lrrobust.results.files import keep_copy, write_file
from lrrobust.results.manifest import fingerprint_of, identity_of, load_manifest
from lrrobust.results.parts import PartId
from lrrobust.results.run import Run, find_runs, group_runs, load_adversarial, load_examples, load_run, manifest_value
from lrrobust.results.schema import OUTCOMES, SCHEMA, SCHEMA_VERSION, breaking_eps, distances, rows_to_table, texts
from lrrobust.results.store import RunStore

__all__ = [
    "OUTCOMES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "AdversarialImage",
    "Example",
    "PartId",
    "Run",
    "RunStore",
    "breaking_eps",
    "distances",
    "example_count",
    "find_runs",
    "fingerprint_of",
    "group_runs",
    "identity_of",
    "keep_copy",
    "load_adversarial",
    "load_examples",
    "load_manifest",
    "load_run",
    "manifest_value",
    "rows_to_table",
    "texts",
    "write_file",
]
