from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.evaluation.tasks import plan_tasks

FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=(0.1, 0.2))
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(0.1,), steps=7)


def test_every_attack_meets_a_chunk_before_the_next_comes():
    tasks = plan_tasks([FGSM, PGD], 5, 3)
    assert [task.part for task in tasks] == [("fgsm", 0, 3), ("pgd", 0, 3), ("fgsm", 3, 5), ("pgd", 3, 5)]


def test_cost_is_that_of_all_images_of_the_chunk():
    whole, rest = (task for task in plan_tasks([PGD], 5, 3))
    assert (whole.cost, rest.cost) == (3 * PGD.max_forward_passes, 2 * PGD.max_forward_passes)
    assert PGD.max_forward_passes >= 7
