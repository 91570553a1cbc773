import pytest
import torch

from lrrobust.training import muon
from lrrobust.training.muon import ITERATIONS, QUINTIC, Muon, orthogonalise


def matrix_with(singular_values, rows, columns, seed=0):
    """A float64 matrix of these singular values, and the nearest orthogonal matrix U V^T."""
    generator = torch.Generator().manual_seed(seed)
    count = len(singular_values)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return left * torch.tensor(singular_values, dtype=torch.float64) @ right.t(), left @ right.t()


@pytest.mark.parametrize("rows, columns", [(6, 6), (6, 40), (40, 6)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_values_come_near_one_and_directions_stay(rows, columns, scale):
    matrix, nearest = matrix_with([5.0, 2.0, 1.0, 0.5, 0.2, 0.1], rows, columns)
    result = orthogonalise((matrix * scale).float(), iterations=5).double()
    assert result.shape == matrix.shape
    singular = torch.linalg.svdvals(result)
    assert 0.65 < singular.min() and singular.max() < 1.25
    # In the basis of U and V the result is diagonal.
    cosine = (result * nearest).sum() / (result.norm() * nearest.norm())
    assert cosine > 0.97


@pytest.mark.parametrize("iterations", [0, 1, 3, 5])
def test_iterations_are_those_of_the_polynomial(iterations):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 30, generator=generator)
    expected = matrix.double() / matrix.double().norm()
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = expected @ expected.t()
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalise(matrix, iterations).double(), expected, rtol=1e-4, atol=1e-5)


def test_zero_stays_zero():
    assert not orthogonalise(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("rows, columns", [(5, 5), (4, 9), (9, 4)])
def test_matrices_of_a_stack_do_not_meet(rows, columns):
    generator = torch.Generator().manual_seed(2)
    stack = torch.randn(2, 3, rows, columns, generator=generator) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    alone = torch.stack([orthogonalise(matrix) for matrix in stack.flatten(0, 1)]).view_as(stack)
    torch.testing.assert_close(orthogonalise(stack), alone, rtol=1e-5, atol=1e-6)


def test_groups_of_other_tensors_follow_adamw():
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(7, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [Muon([{"params": [ours]}], **options), torch.optim.AdamW([theirs], **options)]
    for _ in range(5):
        gradient = torch.randn(7, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_first_step_on_a_kernel():
    gradient, nearest = matrix_with([1.0, 1.0, 1.0, 1.0], 4, 18)
    kernel = torch.nn.Parameter(torch.ones(4, 2, 3, 3))
    kernel.grad = gradient.float().view(4, 2, 3, 3)
    Muon([{"params": [kernel], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
    moved = (kernel.detach().flatten(1) - (1 - 0.1 * 0.5)).double()
    # A matrix of equal singular values s becomes c * U V^T: only the length of the step is the iteration's.
    size = 0.1 * 0.2 * 18**0.5
    factor = -(moved * nearest).sum() / (nearest.norm() ** 2)
    assert 0.65 * size < factor < 1.25 * size
    assert (moved + factor * nearest).norm() < 1e-3 * moved.norm()


# --- many parameters at once -------------------------------------------------------------------------

#: Wide, tall and square as matrices, several alike; in both layouts.
KERNELS = [(4, 2, 3, 3), (18, 4, 1, 1), (4, 18, 1, 1), (4, 2, 3, 3), (18, 4, 1, 1), (18, 2, 1, 2), (4, 18), (5, 5, 1, 1)]
STACKS = [(7, 4, 18), (1, 5, 5)]
OTHERS = [(7,), (3, 4), (2, 3, 2, 2), (1,)]

OPTIONS = {"lr": 0.02, "momentum": 0.9, "betas": (0.8, 0.95), "eps": 1e-6}


def build_parameters(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator)
        if len(shape) == 4 and i % 4 != 3:
            values = values.to(memory_format=torch.channels_last)
        parameters.append(torch.nn.Parameter(values))
    return parameters


def plain_step(values, gradient, state, is_orthogonal, weight_decay):
    """One parameter's step in float64, as the docstring of the optimiser and its sources say it."""
    lr, momentum, (first, second) = OPTIONS["lr"], OPTIONS["momentum"], OPTIONS["betas"]
    values = values * (1 - lr * weight_decay)
    if is_orthogonal:
        state["momentum"] = momentum * state.get("momentum", 0) + (1 - momentum) * gradient
        x = ((1 - momentum) * gradient + momentum * state["momentum"]).reshape(len(values), -1)
        size = 0.2 * max(x.shape) ** 0.5
        x = x / x.norm()
        a, b, c = QUINTIC
        for _ in range(ITERATIONS):
            gram = x @ x.t()
            x = a * x + (b * gram + c * gram @ gram) @ x
        return values - lr * size * x.reshape(values.shape)
    state["step"] = state.get("step", 0) + 1
    state["mean"] = first * state.get("mean", 0) + (1 - first) * gradient
    state["square"] = second * state.get("square", 0) + (1 - second) * gradient**2
    mean, square = state["mean"] / (1 - first ** state["step"]), state["square"] / (1 - second ** state["step"])
    return values - lr * mean / (square.sqrt() + OPTIONS["eps"])


@pytest.mark.parametrize("stack_size", [1, 2, 64])
def test_steps_are_those_of_a_plain_loop(stack_size, monkeypatch):
    monkeypatch.setattr(muon, "STACK_SIZE", {"cpu": stack_size})
    kernels, others, undecayed = build_parameters(KERNELS, 0), build_parameters(OTHERS, 1), build_parameters(OTHERS, 2)
    groups = [
        {"params": kernels, "orthogonal": True, "weight_decay": 0.3},
        {"params": others, "weight_decay": 0.3},
        {"params": undecayed},
    ]
    optimizer = Muon(groups, **OPTIONS)
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    strides = [p.stride() for p, _ in parameters]
    expected, states = [p.detach().double() for p, _ in parameters], [{} for _ in parameters]
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        for i, (parameter, group) in enumerate(parameters):
            # Some have none at times, so that the numbers of their steps differ.
            if (i + step) % 5 == 0:
                parameter.grad = None
                continue
            # Of the parameter's layout, as autograd's are, and of another.
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step % 2:
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            gradient = parameter.grad.double()
            expected[i] = plain_step(expected[i], gradient, states[i], group["orthogonal"], group["weight_decay"])
        optimizer.step()
        for i, (parameter, _) in enumerate(parameters):
            torch.testing.assert_close(parameter.detach().double(), expected[i], rtol=1e-5, atol=1e-5)
    assert [p.stride() for p, _ in parameters] == strides
    # What checkpoints hold.
    for i, (parameter, group) in enumerate(parameters):
        state = optimizer.state[parameter]
        assert list(state) == (["momentum"] if group["orthogonal"] else ["step", "mean", "square"])
        assert "step" not in state or type(state["step"]) is int
        found = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in state.items()}
        wanted = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in states[i].items()}
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stack_size", [1, 64])
def test_matrices_of_one_shape_are_stacked(stack_size, monkeypatch):
    monkeypatch.setattr(muon, "STACK_SIZE", {"cpu": stack_size})
    shapes = []
    monkeypatch.setattr(muon, "orthogonalise", lambda x: shapes.append(tuple(x.shape)) or orthogonalise(x))
    kernels = build_parameters(KERNELS, 0)
    for kernel in kernels:
        kernel.grad = torch.ones_like(kernel)
    Muon([{"params": kernels, "orthogonal": True}], lr=0.1).step()
    assert shapes == (STACKS if stack_size == 64 else [(1, *shape) for count, *shape in STACKS for _ in range(count)])


def test_a_step_asks_the_device_for_no_number(monkeypatch):
    # Tensors without values refuse to be looked at, as a GPU would have to be waited for.
    monkeypatch.setattr(muon, "STACK_SIZE", {"meta": 64})
    kernels, others = (
        [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes] for shapes in (KERNELS, OTHERS)
    )
    for parameter in kernels + others:
        parameter.grad = torch.empty_like(parameter)
    optimizer = Muon([{"params": kernels, "orthogonal": True}, {"params": others}], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.step()
