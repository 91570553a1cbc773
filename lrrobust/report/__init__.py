"""Runs -> tables and figures: robust accuracy with its interval, per attack and for the worst case.

- `outcomes`: what the numbers need of a run's rows, in plain dtypes.
- `summary`, `curves`: the numbers.
- `naming`, `formatting`, `notices`, `reproduction`: what readers are told of runs and numbers.
- `summary_table`, `figures`, `drawing`, `files`: what people read.
"""
