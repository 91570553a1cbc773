"""How robust an image classifier really is to adversarial attacks, and whether a robustness claim holds."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    # Not at import: torch takes seconds, and `--help` answers at once.
    if name == "evaluate":
        from lrrobust.in_memory import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
