"""`python -m lrrobust` is `lrrobust`."""

from lrrobust.cli import main

main()
