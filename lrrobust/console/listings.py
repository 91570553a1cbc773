"""What comes with the package: networks with their weights, attacks and suites."""

from __future__ import annotations

import math

from rich.table import Table

from lrrobust.console.streams import notice, print_table


def print_models() -> None:
    """Our networks, their size, and their shipped weights with what they score."""
    import torch

    from lrrobust.models.registry import NETWORKS
    from lrrobust.models.weights import SHIPPED_WEIGHTS, TRAINED_FOLDER, read_metadata

    table = Table("model", "parameters (M)", "weights", "classes", "input", "clean accuracy (%)", title="networks")
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build(1000).parameters())
        size = f"{count / 1e6:.1f}"
        if name not in SHIPPED_WEIGHTS:
            table.add_row(name, size, "-", "-", "any", "-")
            continue
        for weights in SHIPPED_WEIGHTS[name].values():
            metadata = read_metadata(TRAINED_FOLDER / weights.file)
            scores = ", ".join(f"{100 * a.top1:.1f} ({a.dataset}, n = {a.n})" for a in metadata.accuracy)
            table.add_row(name, size, metadata.name, str(len(metadata.classes)), f"{metadata.input_size}", scores)
    print_table(table)
    notice("also: any torchvision name, timm:NAME, path/to/file.py:factory; parameters are for 1000 classes")


def print_attacks() -> None:
    """The shipped attacks and suites."""
    from lrrobust.attacks.suite import list_attacks

    table = Table("name", "kind", "norm", "what it does", title="attacks and suites")
    for listing in list_attacks():
        table.add_row(listing.name, listing.kind, listing.norm, listing.description)
    print_table(table)


def print_settings(name: str) -> None:
    """One attack or suite as the YAML file of one's own that says the same."""
    import yaml

    from lrrobust.attacks.suite import read_settings

    # Not through rich, which would break lines where the terminal ends.
    print(
        yaml.safe_dump(read_settings(name), sort_keys=False, default_flow_style=None, width=math.inf, allow_unicode=True),
        end="",
    )
