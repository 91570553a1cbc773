"""Claims as YAML files: what is said of two models, and what would show it.

A file holds the fields of `Claim` but the name, which is the file's own:

    statement: A is more robust than B.
    source: who says so, and where
    treatment: lr_resnet50
    control: resnet50                 # or MODEL@WEIGHTS, such as resnet50@TINY_IMAGENET_V1, to compare weights of a model
    direction: more_robust            # or less_robust, said of the treatment
    attacks: [pgd, cw]                # without: all that both models were evaluated with
    eps: {linf: [1/255, 2/255]}       # without: all that both have
    dataset: photos                   # without: any
    subset: {n: 500, seed: 0}         # without: any; also `balanced`; `sha256`, which reports tell, for --indices
    significance: 0.05                # this and the next three: without, as here, which the verdict says
    power: 0.8
    smallest_difference: 0.02
    largest_clean_difference: 0.02
    same_training: false              # without: recipes must not differ, as adversarial training makes any network robust
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrrobust.config_file import check_keys, locate, read_mapping
from lrrobust.errors import ConfigError
from lrrobust.verdict.records import Claim

CLAIMS_FOLDER = Path(__file__).parent / "claims"

#: The claim that is judged when none is named.
DEFAULT_CLAIM = "lrnet_more_robust"


def load_claims(names_or_paths: Sequence[str | Path]) -> list[Claim]:
    """Several claims, see `load_claim`, each once.

    Raises:
        ConfigError: also where two files share a name, by which reports tell claims apart.
    """
    claims: dict[str, Claim] = {}
    for claim in map(load_claim, dict.fromkeys(names_or_paths)):
        if claim.name in claims:
            raise ConfigError(f"two claims are called {claim.name}: rename the file of one, as reports tell them apart by it")
        claims[claim.name] = claim
    return list(claims.values())


def load_claim(name_or_path: str | Path) -> Claim:
    """A shipped claim by name, or one in a YAML file.

    Raises:
        UnknownNameError: neither a shipped claim nor a file.
        ConfigError: names the file, the key, and what was expected there.
    """
    path = locate("claim", name_or_path, CLAIMS_FOLDER)
    data = read_mapping(path, str(path), example="treatment: lr_resnet50")
    if "name" in data:
        raise ConfigError(f"{path}: name: unexpected key, a claim is named after its file")
    return check_keys({**data, "name": path.stem}, Claim, str(path), given=["name"])
