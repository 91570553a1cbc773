"""How robust an image classifier really is to adversarial attacks, and whether a robustness claim holds."""

__version__ = "0.1.0"
