import torch

from lrrobust.evaluation.chunk_images import ChunkImages
from lrrobust.evaluation.chunks import Chunk


def test_a_chunk_holds_its_images_and_what_they_are_called(problem, images):
    chunk = ChunkImages.load(images, Chunk(3, 5))
    assert torch.equal(chunk.images, problem.images[3:5]) and torch.equal(chunk.labels, problem.labels[3:5])
    assert (chunk.indices, chunk.keys) == ([30, 40], ["class/3.png", "class/4.png"])
    assert chunk.wnids == images.wnids[3:5]
    assert images.loaded == [3, 4]


def test_moved_elsewhere_it_is_called_the_same(problem, images):
    chunk = ChunkImages.load(images, Chunk(0, 2))
    moved = chunk.to(torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert (moved.indices, moved.keys, moved.wnids) == (chunk.indices, chunk.keys, chunk.wnids)
