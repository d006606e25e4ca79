"""Gather and dense against the slow reference, with weights of one number a slot and one a (slot, rank) pair."""

from __future__ import annotations

import pytest
import torch

from mta_ray.lora.kernels import aligned, choose, dense, gather, reference


@pytest.mark.parametrize("kernel", [gather, dense])
@pytest.mark.parametrize("per_rank", [False, True])
def test_fast_forms_equal_the_reference(kernel, per_rank):
    torch.manual_seed(0)
    rows, tokens, slots, rank, k = 5, 3, 7, 4, 3
    x = torch.randn(rows, tokens, 16, dtype=torch.float64)
    down = torch.randn(slots, rank, 16, dtype=torch.float64)
    up = torch.randn(slots, rank, 12, dtype=torch.float64)
    chosen = torch.randint(slots, (rows, k))
    chosen[0] = 2  # the same slot three times counts three times
    weights = torch.randn(rows, k, rank if per_rank else 1, dtype=torch.float64)
    torch.testing.assert_close(kernel(x, down, up, chosen, weights), reference(x, down, up, chosen, weights))


@pytest.mark.parametrize("kernel", [gather, dense])
def test_gradients_equal_the_reference(kernel):
    torch.manual_seed(1)
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    chosen, weights = torch.tensor([[0], [1], [1], [2]]), torch.ones(4, 1, 1, dtype=torch.float64)
    gradients = []
    for form in (reference, kernel):
        torch.manual_seed(2)
        down = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
        up = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
        form(x, down, up, chosen, weights).pow(2).sum().backward()
        gradients.append((down.grad, up.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("per_rank", [False, True])
def test_rows_that_are_a_piece_of_the_shelf_equal_the_reference(per_rank):
    torch.manual_seed(5)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    down, up = torch.randn(7, 2, 16, dtype=torch.float64), torch.randn(7, 2, 12, dtype=torch.float64)
    chosen, weights = torch.tensor([[2], [3], [4]]), torch.randn(3, 1, 2 if per_rank else 1, dtype=torch.float64)
    wanted = reference(x, down, up, chosen, weights)
    torch.testing.assert_close(aligned(x, down[2:5], up[2:5], chosen, weights), wanted)


@pytest.mark.parametrize("kernel", [gather, dense, reference])
@pytest.mark.parametrize("per_rank", [False, True])
def test_gradients_of_the_weights_are_those_of_finite_differences(kernel, per_rank):
    torch.manual_seed(4)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    down, up = torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(4, 2, 6, dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [1, 3], [2, 2]])
    weights = torch.randn(3, 2, 2 if per_rank else 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: kernel(x, down, up, chosen, w), (weights,))


def test_a_rows_result_does_not_depend_on_its_neighbours():
    torch.manual_seed(3)
    x, down, up = torch.randn(6, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    chosen, weights = torch.randint(4, (6, 2)), torch.rand(6, 2, 1)
    for kernel in (gather, dense):
        together = kernel(x, down, up, chosen, weights)
        alone = kernel(x[2:3], down, up, chosen[2:3], weights[2:3])
        torch.testing.assert_close(together[2:3], alone)


def test_choice_is_dense_only_where_the_shelf_is_read_more_than_once():
    assert choose(rows=1, k=4, slots=50) is gather
    assert choose(rows=64, k=4, slots=50) is dense
    assert choose(rows=64, k=1, slots=64) is gather
    assert choose(rows=4096, k=4, slots=500) is gather
