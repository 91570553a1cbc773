"""Attacks: checked specs, YAML files and suites, and the code that proposes adversarial images."""
