import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_process import environment
from torch import nn

from lrrobust.errors import ConfigError
from lrrobust.training.adversarial import AdversarialSpec
from lrrobust.training.batch_norm import SharedBatchNorm2d, share_batch_statistics
from lrrobust.training.mixing import MixingSpec
from lrrobust.training.ranks import Ranks, joined_ranks
from lrrobust.training.trainer import Training

#: What a row of the log says apart from times.
ROW = ("epoch", "step", "image_size", "learning_rate", "train_loss")


@pytest.fixture
def everything(recipe):
    """A recipe in which all that is random about a step takes part.

    The attack's budget is small: steps along signs turn rounding into differences of its size.
    """
    return recipe.model_copy(
        update={
            "trivial_augment": True,
            "mixing": MixingSpec(mixup_alpha=0.2, cutmix_alpha=1.0, share=0.8),
            "adversarial": AdversarialSpec(norm="linf", eps=0.5 / 255, steps=2, step_size_ratio=1.25),
        }
    )


@pytest.fixture
def two_processes(everything, colours, tmp_path):
    """Exit codes and messages of both processes of `processes.py`."""
    torch.save((colours.images, colours.labels), tmp_path / "data.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [everything.model_dump_json(), tmp_path / "data.pt", tmp_path]
    started = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("processes.py"), *map(str, arguments)],
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [(process.communicate(timeout=120)[1], process.returncode) for process in started]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_two_processes_follow_the_curve_of_one(two_processes, everything, colours, tiny_lr_net, tmp_path):
    (first_message, first_code), (second_message, second_code) = two_processes
    assert second_code == -signal.SIGKILL, second_message
    assert first_code != 0, first_message
    # Interrupted in one of them, stopped by both after the same step, with the same weights.
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["step"] == 3
    # Resumed by both, killed in one of them; the last checkpoint is resumed by a single process.
    resumed = Training(tiny_lr_net, everything, colours, tmp_path / "run")
    assert 6 <= resumed.step <= 7
    resumed.run()
    one = Training(tiny_lr_net, everything, colours, tmp_path / "one")
    one.run()
    assert one.rows[-1]["train_loss"] < one.rows[0]["train_loss"]
    for row, other in zip(resumed.rows, one.rows, strict=True):
        # Of 8 images held out one may lie at the boundary, where rounding decides.
        assert row["holdout_top1"] == pytest.approx(other["holdout_top1"], abs=1 / 8)
        assert {key: row[key] for key in ROW} == pytest.approx({key: other[key] for key in ROW}, rel=1e-3)


def test_a_single_process_sends_nothing():
    with joined_ranks(torch.device("cpu")) as (ranks, device):
        assert (ranks, device) == (Ranks(0, 1), torch.device("cpu"))
        value = torch.tensor(2.5)
        assert ranks.mean(value) is value and ranks.total(3, device) == 3
        assert not torch.distributed.is_initialized()


def test_parts_of_a_batch_are_equal_and_hold_whole_pairs():
    assert [Ranks(rank, 3).rows(18) for rank in range(3)] == [slice(0, 6), slice(6, 12), slice(12, 18)]
    assert Ranks().rows(7) == slice(0, 7)
    for count, batch_size in ((2, 7), (4, 12), (3, 8)):
        with pytest.raises(ConfigError, match=f"batch_size {batch_size} cannot be divided among {count} processes"):
            Ranks(0, count).rows(batch_size)


def test_processes_that_cannot_join(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^the training processes cannot join \([^\n]*\): start them with torchrun$"):
        with joined_ranks(torch.device("cpu")):
            pytest.fail("joined nobody")


@pytest.fixture
def group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("autocast", [False, True])
def test_shared_statistics_of_one_process_are_torchs_own(group_of_one, autocast):
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    nn.init.uniform_(own[1].weight, 0.5, 1.5)
    nn.init.normal_(own[1].bias)
    shared = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    shared.load_state_dict(own.state_dict())
    parameters = list(shared.parameters())
    share_batch_statistics(shared)
    assert isinstance(shared[1], SharedBatchNorm2d) and all(
        a is b for a, b in zip(shared.parameters(), parameters, strict=True)
    )
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(3):
        images = torch.rand(4, 3, 8, 8) * 3 + 5
        gradients = []
        for network in (own, shared):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = network(images)
            gradients.append(torch.autograd.grad(out.float().square().mean(), list(network.parameters())))
        torch.testing.assert_close(gradients[1], gradients[0], **tolerance)
    torch.testing.assert_close(dict(shared.state_dict()), dict(own.state_dict()), **tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(shared.eval()(images), own.eval()(images), **tolerance)
