"""Attack a classifier, judge what the attack proposes, and store one row per image, attack and eps."""
