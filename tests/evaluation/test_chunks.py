import pytest

from lrrobust.evaluation.chunks import chunk_seed, plan_chunks, start_seed


@pytest.mark.parametrize(("n", "chunk_size"), [(1, 1), (1, 50), (50, 50), (51, 50), (500, 32)])
def test_chunks_cover_every_image_once_in_order(n, chunk_size):
    chunks = plan_chunks(n, chunk_size)
    assert [i for chunk in chunks for i in range(*chunk)] == list(range(n))
    assert max(stop - start for start, stop in chunks) <= chunk_size


@pytest.mark.parametrize(("n", "chunk_size"), [(0, 1), (1, 0), (-3, 2)])
def test_nothing_to_cut_is_refused(n, chunk_size):
    with pytest.raises(ValueError, match="at least one image"):
        plan_chunks(n, chunk_size)


def test_seeds_are_pinned():
    # Stored results were drawn with these: another value would make old runs unrepeatable.
    assert chunk_seed("ab", "pgd", 32) == 2273631902383155028
    assert start_seed("ab", "pgd", "n01/a.png", 4 / 255, 0) == 4887183411756908336


def test_seeds_differ_in_every_argument():
    base = ("ab", "pgd", "a.png", 0.5, 0)
    others = [("ac", *base[1:]), ("ab", "fgsm", *base[2:]), (*base[:2], "b.png", 0.5, 0), (*base[:3], 0.25, 0), (*base[:4], 1)]
    seeds = {start_seed(*arguments) for arguments in [base, *others]}
    seeds |= {
        chunk_seed(*arguments) for arguments in [("ab", "pgd", 0), ("ac", "pgd", 0), ("ab", "fgsm", 0), ("ab", "pgd", 32)]
    }
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)
