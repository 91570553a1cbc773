"""The gate for continuous integration: a fresh run against a committed baseline, on the same images."""
