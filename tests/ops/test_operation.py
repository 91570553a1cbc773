"""Past the dispatcher and through it, a fused operation is the same; only those who need the dispatcher go through it."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lrrobust.errors import BackendError
from lrrobust.ops import _cpu, local_relation  # noqa: F401 - registers the operation

OPTIONS = (1, 1, "squared_difference", 8)


class Logits(torch.Tensor):
    """A subclass, of which nobody here knows what it wants."""


class Nothing(torch.autograd.Function):
    """Uses what it is given, and has no gradient for it."""

    @staticmethod
    def forward(ctx, maps):
        return maps.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


class Heard(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


def goes_past(out):
    return out.grad_fn.name() == "_LocalRelationBackward"


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
    assert goes_past(past) and not goes_past(through)
    torch.testing.assert_close(past, through, rtol=0, atol=0)
    torch.testing.assert_close(gradients(past, inputs), gradients(through, inputs), rtol=0, atol=0)


def test_parameters_are_plain(inputs):
    geometry = torch.nn.Parameter(inputs[3].detach())
    out = relate(*inputs[:3], geometry)
    assert goes_past(out)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), geometry), torch.autograd.grad(relate(*inputs).sum(), inputs[3]))


def test_subclasses_go_through_the_dispatcher(inputs):
    assert not goes_past(relate(*inputs[:3], inputs[3].detach().as_subclass(Logits)))


def test_who_listens_to_the_dispatcher_hears_of_it(inputs):
    with Heard() as heard:
        relate(*inputs)
    assert any("local_relation_cpu" in name for name in heard.names)


def test_traced_graphs_hold_the_operation(inputs):
    plain = [x.detach() for x in inputs]
    graph = make_fx(relate)(*plain)
    assert any("local_relation_cpu" in str(node.target) for node in graph.graph.nodes)
    others = [2 * x for x in plain]
    torch.testing.assert_close(graph(*others), relate(*others), rtol=0, atol=0)


def test_vmap(inputs):
    stacked = [torch.stack([x.detach(), 2 * x.detach()]) for x in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a loop
        found = torch.func.vmap(relate)(*stacked)
    torch.testing.assert_close(found, torch.stack([relate(*(x[i] for x in stacked)) for i in range(2)]))


def test_a_second_derivative_is_refused_whatever_else_leads_to_the_inputs(inputs):
    value = inputs[2]
    out = value + relate(*inputs)
    (gradient,) = torch.autograd.grad((out**3).sum(), value, create_graph=True)
    with pytest.raises(BackendError, match="can be differentiated once: give .*unfold"):
        torch.autograd.grad(gradient.sum(), value)


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


@pytest.mark.parametrize("is_past", [True, False])
def test_an_output_may_be_changed_in_place(is_past, inputs):
    leaf = inputs[3] if is_past else inputs[3].detach().as_subclass(Logits)
    expected = gradients(relate(*inputs).relu(), inputs[:3])
    torch.testing.assert_close(gradients(relate(*inputs[:3], leaf).relu_(), inputs[:3]), expected, rtol=0, atol=0)


def test_an_output_without_a_gradient_gives_none(inputs):
    assert torch.autograd.grad(Nothing.apply(relate(*inputs)).sum(), inputs, allow_unused=True) == (None,) * 4
