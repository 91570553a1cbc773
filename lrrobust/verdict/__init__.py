"""Whether a robustness claim holds on the evidence of runs."""
