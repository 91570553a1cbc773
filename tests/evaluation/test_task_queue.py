import itertools

import pytest

from lrrobust.attacks.specs import FgsmSpec, PgdSpec
from lrrobust.evaluation.task_queue import Sharing, TaskQueue
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.results import PartId
from lrrobust.results.leases import Leases

SPECS = [
    FgsmSpec(kind="fgsm", name="fgsm", eps=(1 / 255,)),
    PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(1 / 255,), steps=2),
]


class Idle(Exception):
    pass


def idle(_):
    raise Idle


class Clock:
    now = 0.0


def stems(parts):
    return {PartId(*part).stem for part in parts}


class Store:
    """Parts by name, some of them damaged; leases that run on a clock of ours."""

    def __init__(self, folder, clock=None):
        self.folder, self.clock = folder, clock or Clock()
        self.parts, self.damaged, self.looked = [], set(), []

    def present_parts(self):
        return stems(self.parts)

    def has_part(self, *part):
        self.looked.append(part)
        if part in self.damaged:
            self.damaged.discard(part)
            self.parts.remove(part)
        return part in self.parts

    def leases(self, lease_s):
        return Leases(self.folder / "leases", lease_s, lambda: self.clock.now)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def queue(store, sharing=None, images=8, seen=None, sleep=idle, specs=SPECS):
    tasks = plan_tasks(specs, images, 2)
    return TaskQueue(tasks, store, sharing, lambda task: None if seen is None else seen.append(task.part), sleep)


def all_parts(images=8):
    return [task.part for task in plan_tasks(SPECS, images, 2)]


def finish(tasks, store):
    """Stores all that it is given; what that was."""
    done = []
    for task in tasks:
        done.append(task.part)
        store.parts.append(task.part)
    return done


def test_alone_in_order_without_what_is_stored(store):
    store.parts = [all_parts()[1], all_parts()[2], ("strange", 0, 2)]
    seen = []
    with queue(store, seen=seen) as tasks:
        assert [task.part for task in tasks.drop_stored()] == seen == store.parts[:2]
        done = finish(tasks, store)
    assert done == [part for part in all_parts() if part not in seen]
    assert not (store.folder / "leases").exists()


def test_alone_a_damaged_part_is_done_again(store):
    store.parts, store.damaged = all_parts(), {all_parts()[3]}
    with queue(store) as tasks:
        assert len(tasks.drop_stored()) == len(all_parts()) - 1
        assert [task.part for task in tasks] == [all_parts()[3]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 40])
def test_each_task_goes_to_one_of_them(store, world_size):
    queues = [queue(store, Sharing(rank, world_size)) for rank in range(world_size)]
    turns, done = [iter(each) for each in queues], []
    while turns:
        for turn in list(turns):
            try:
                task = next(turn)
            except (StopIteration, Idle):
                turns.remove(turn)
                continue
            done.append((turn, task.part))
        # All hold one now, then all store it.
        for _, part in done[len(store.parts) :]:
            store.parts.append(part)
    assert sorted(part for _, part in done) == sorted(all_parts())
    for each in queues:
        each.__exit__()
    assert list((store.folder / "leases").iterdir()) == []


def test_ranks_begin_apart_and_stay_with_their_images(store):
    assert [next(iter(queue(store, Sharing(rank, 4)))).chunk.start for rank in range(4)] == [0, 2, 4, 6]
    (store.folder / "leases").rename(store.folder / "given back")
    assert finish(queue(store, Sharing(2, 4)), store) == all_parts()[4:] + all_parts()[:4]


def test_what_a_dead_process_was_at_is_taken_over(store):
    dead = iter(queue(store, Sharing(1, 2, lease_s=60)))
    lost = next(dead).part

    def sleep(pause_s):
        assert 0 < pause_s <= 15
        store.clock.now += pause_s

    done = finish(queue(store, Sharing(0, 2, lease_s=60), sleep=sleep), store)
    assert sorted(done) == sorted(all_parts()) and done[-1] == lost
    assert 60 <= store.clock.now < 90


def test_what_a_slow_process_stores_in_time_is_not_done_again(store):
    slow = queue(store, Sharing(1, 2, lease_s=60))
    at = next(iter(slow)).part
    seen = []

    def sleep(pause_s):
        store.clock.now += pause_s
        if store.clock.now < 200:
            slow.renew()
        elif at not in store.parts:
            store.parts.append(at)

    done = finish(queue(store, Sharing(0, 2, lease_s=60), seen=seen, sleep=sleep), store)
    assert sorted([*done, at]) == sorted(all_parts()) and seen == [at]


def test_nobody_sleeps_much_longer_than_the_others_work(store):
    next(iter(queue(store, Sharing(1, 2, lease_s=1e9))))
    pauses = []

    def sleep(pause_s):
        pauses.append(pause_s)
        if sum(pauses) > 600:
            raise Idle

    with pytest.raises(Idle):
        finish(queue(store, Sharing(0, 2, lease_s=1e9), sleep=sleep), store)
    waits = list(itertools.accumulate(pauses))
    assert all(pause_s <= 0.051 + 0.11 * waited for pause_s, waited in zip(pauses[1:], waits))
    # Nor are hundreds of processes forever at the file system.
    assert max(pauses) == 5 and len(pauses) < 250


def test_a_part_stored_between_look_and_lease_is_not_done_again(store):
    mine = queue(store, Sharing(0, 1))
    looks = itertools.count()

    def present_parts():
        # The first look sees nothing, and then somebody has done everything.
        if next(looks):
            store.parts = all_parts()
        return stems(store.parts)

    store.present_parts = present_parts
    with pytest.raises(Idle):
        next(iter(mine))
    assert list(mine) == []
    assert list((store.folder / "leases").iterdir()) == []


def test_rank_0_looks_through_what_the_others_did(store):
    mine, done = queue(store, Sharing(0, 2)), []
    for task in mine:
        done.append(task.part)
        store.parts.append(task.part)
        if len(done) == 1:
            # The other does all the rest, one part of it badly.
            store.parts, store.damaged = all_parts(), {all_parts()[4]}
    assert done == [all_parts()[0], all_parts()[4]]
    assert not store.damaged


def test_the_other_ranks_do_not_read_what_they_did_not_write(store):
    store.parts, store.damaged = all_parts()[:4], {all_parts()[0]}
    with queue(store, Sharing(1, 2)) as tasks:
        assert len(tasks.drop_stored()) == 4
        finish(tasks, store)
    assert store.looked == []


def test_guesses_the_next_chunk(store):
    alone = queue(store)
    first = next(iter(alone))
    assert first.chunk == (0, 2) and alone.chunk_after(first.chunk) == (2, 4)
    assert alone.chunk_after((6, 8)) is None
    second = queue(store, Sharing(3, 4))
    turn = iter(second)
    assert next(turn).chunk == (6, 8) and second.chunk_after((6, 8)) == (0, 2)
    store.parts = [part for part in all_parts() if part[1] in (0, 6)]
    assert next(turn).chunk == (2, 4) and second.chunk_after((2, 4)) == (4, 6)


def test_attacks_in_another_norm_are_not_waited_for(store):
    specs = [SPECS[0], SPECS[1].model_copy(update={"survivors_only": True, "norm": "l2"})]
    first, second = (iter(queue(store, Sharing(0, 1), 2, specs=specs)) for _ in range(2))
    assert next(first).part == ("fgsm", 0, 2)
    task = next(second)
    assert task.part == ("pgd", 0, 2) and list(queue(store, None, 2, specs=specs).earlier(task)) == []


def test_what_builds_upon_earlier_attacks_waits_for_them(store):
    specs = [SPECS[0], SPECS[1].model_copy(update={"survivors_only": True})]
    first, second = (iter(queue(store, Sharing(0, 1), 4, specs=specs)) for _ in range(2))
    assert next(first).part == ("fgsm", 0, 2)
    # The other attack on these images has to wait, those on others have not.
    assert next(second).part == ("fgsm", 2, 4)
    store.parts.append(("fgsm", 2, 4))
    assert next(second).part == ("pgd", 2, 4)
    store.parts.append(("pgd", 2, 4))
    with pytest.raises(Idle):
        next(second)
    store.parts.append(("fgsm", 0, 2))
    task = next(first)
    assert task.part == ("pgd", 0, 2)
    whole = queue(store, None, 4, specs=specs)
    assert [earlier.part for earlier in whole.earlier(task)] == [("fgsm", 0, 2)]
    assert list(queue(store, None, 4).earlier(task)) == []
