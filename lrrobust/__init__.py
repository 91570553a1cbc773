"""How robust an image classifier really is to adversarial attacks, and whether a robustness claim holds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrrobust.attacks.custom import CustomAttack as CustomAttack
    from lrrobust.in_memory import evaluate as evaluate
    from lrrobust.in_memory import load_classifier as load_classifier

__version__ = "0.1.0"

__all__ = ["CustomAttack", "__version__", "evaluate", "load_classifier"]


def __getattr__(name: str) -> Any:
    # Not at import: torch takes seconds, and `--help` answers at once.
    if name in ("CustomAttack", "evaluate", "load_classifier"):
        from lrrobust import in_memory

        return getattr(in_memory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
