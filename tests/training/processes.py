"""Run by test_ranks.py, once for each of two processes: a training interrupted, resumed, and killed."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch

from lrrobust.models import registry
from lrrobust.training import trainer
from lrrobust.training.images import TrainingSet
from lrrobust.training.ranks import joined_ranks
from lrrobust.training.recipe import Recipe

recipe_json, data, folder = sys.argv[1:]
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("training_conftest", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
registry.NETWORKS = {"tiny": conftest.TinyLrNet}
recipe = Recipe.model_validate_json(recipe_json)
images = TrainingSet(*torch.load(data))


def press(progress):
    # One process alone hears it.
    if progress.step == 3 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)


def kill(progress):
    if progress.step == 7 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


with joined_ranks(torch.device("cpu")) as (ranks, device):
    run = trainer.Training("tiny", recipe, images, Path(folder, "run"), str(device), ranks=ranks)
    try:
        run.run(press)
    except KeyboardInterrupt:
        digests = [tensor.double().sum().item() for tensor in run.network.state_dict().values()]
        Path(folder, f"{ranks.rank}.json").write_text(json.dumps({"step": run.step, "digests": digests}))
    torch.distributed.barrier()
    trainer.CHECKPOINT_INTERVAL_S = 0.0
    trainer.Training("tiny", recipe, images, Path(folder, "run"), str(device), ranks=ranks).run(kill)
