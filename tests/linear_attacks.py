"""Attacks around the distances of the linear problem: some images break at each budget, some do not.

Found by every test, as pyproject.toml says.
"""

from lrrobust.attacks.specs import CwSpec, FgsmSpec, PgdSpec

LADDER = (1e-4, 2e-4, 4e-4, 7e-4, 1.5e-3)
L2_LADDER = (1e-3, 2e-3, 4e-3, 7e-3, 1.5e-2)
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=L2_LADDER, steps=10)
CW = CwSpec(name="cw", kind="cw", eps=L2_LADDER, binary_search_steps=6, steps=100, lr=0.0005, initial_c=1.0)


def rows_of(rows, attack, eps):
    return rows[(rows.attack == attack) & (rows.eps == eps)].sort_values("index")
