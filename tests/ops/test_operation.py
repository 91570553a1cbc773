"""Past the dispatcher and through it, a fused operation is the same; only those who need the dispatcher go through it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lrrobust.ops import _cpu, local_relation  # noqa: F401 - registers the operation

OPTIONS = (1, 1, "squared_difference", 8)


class Logits(torch.Tensor):
    """A subclass, of which nobody here knows what it wants."""


class Heard(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, 5, 4), (2, 2, 5, 4), (2, 12, 5, 4), (2, 3, 3)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def relate(*tensors):
    return local_relation(*tensors, kernel_size=3, backend="cpu")


def gradients(out, inputs):
    return torch.autograd.grad((out * out.detach().cos()).sum(), inputs)


def test_both_ways_give_the_same(inputs):
    past, through = relate(*inputs), torch.ops.lrrobust.local_relation_cpu(*inputs, *OPTIONS)[0]
    torch.testing.assert_close(past, through, rtol=0, atol=0)
    torch.testing.assert_close(gradients(past, inputs), gradients(through, inputs), rtol=0, atol=0)


def test_plain_tensors_go_past_the_dispatcher(inputs):
    with Heard() as heard:
        gradients(relate(*inputs), inputs)
    assert heard.names and not any("local_relation" in name for name in heard.names)


def test_subclasses_go_through_the_dispatcher(inputs):
    with Heard() as heard:
        relate(*inputs[:3], inputs[3].detach().as_subclass(Logits))
    assert any("local_relation_cpu" in name for name in heard.names)


def test_parameters_are_plain(inputs):
    geometry = torch.nn.Parameter(inputs[3].detach())
    with Heard() as heard:
        out = relate(*inputs[:3], geometry)
    assert not any("local_relation" in name for name in heard.names)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), geometry), torch.autograd.grad(relate(*inputs).sum(), inputs[3]))


def test_fake_tensors_learn_shape_dtype_and_layout(inputs):
    plain = [x.detach() for x in inputs]
    expected = relate(*plain)
    with FakeTensorMode() as mode:
        fake = relate(*(mode.from_tensor(x) for x in plain))
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_without_gradients_nothing_is_kept(inputs):
    with torch.no_grad():
        assert relate(*inputs).grad_fn is None
    assert not relate(*(x.detach() for x in inputs)).requires_grad


def test_an_output_that_nobody_uses_has_no_gradient(inputs):
    out = relate(*inputs)
    unused = torch.autograd.grad(torch.zeros((), requires_grad=True) + 0 * out.detach().sum(), inputs, allow_unused=True)
    assert unused == (None,) * 4
