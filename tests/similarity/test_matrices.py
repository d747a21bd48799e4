"""Centring, sums and products of matrices, against numpy in float64, and whose threads they are computed on."""

import time

import numpy as np
import pytest
import torch
from builders import gpt2, token_batch
from threadpoolctl import ThreadpoolController, threadpool_limits

from hf_guidance import GuidanceLoss
from hf_guidance.similarity.layers import gram
from hf_guidance.similarity.matrices import (
    BLOCK,
    NUMPY_THREADS,
    center_in_place,
    centred_product,
    exact_float32,
    for_numpy,
    inner,
    one_thread,
    outer,
    u_center,
)
from hf_guidance.similarity.measures import linear_cka


@pytest.fixture
def kernel() -> torch.Tensor:
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ x.T


def test_centring_is_that_by_the_centring_matrix(kernel: torch.Tensor) -> None:
    h = np.eye(7) - 1 / 7
    expected = h @ kernel.numpy() @ h
    np.testing.assert_allclose(center_in_place(kernel.clone()).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(center_in_place(torch.stack([kernel, 2 * kernel]))[1].numpy(), 2 * expected, atol=1e-12)


def test_u_centring_leaves_rows_that_sum_to_zero_and_no_diagonal(kernel: torch.Tensor) -> None:
    centred = u_center(kernel).numpy()
    np.testing.assert_allclose(centred.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.diag(centred), 0)
    n, a = 7, kernel.numpy() - np.diag(np.diag(kernel.numpy()))
    rows = a.sum(1, keepdims=True)
    expected = a - rows / (n - 2) - rows.T / (n - 2) + a.sum() / ((n - 1) * (n - 2))  # Székely & Rizzo 2014, eq. 2.2
    np.testing.assert_allclose(centred, expected - np.diag(np.diag(expected)), atol=1e-12)


def test_many_products_in_float32_keep_their_digits() -> None:
    many = torch.rand(2000, 2000, generator=torch.Generator().manual_seed(0))
    exact = (many.numpy().astype(np.float64) ** 2).sum()
    assert inner(many, many).item() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_a_product_with_its_own_transpose_is_that_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(outer(x), x @ x.mT)


@pytest.mark.parametrize("width", [60, BLOCK + 60])
@pytest.mark.parametrize(("offset", "subtracts"), [(0.0, [False, False]), (2.9, [False, True]), (9.0, [True, True])])
def test_the_mean_is_left_in_only_where_it_is_small(width: int, offset: float, subtracts: list[bool]) -> None:
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0)) + offset
    exact = x.double() - x.double().mean(0)
    for with_gradient, subtracted in zip((False, True), subtracts, strict=True):
        kernel, energy, mean = centred_product(x, with_gradient)
        assert (mean is not None) == subtracted
        torch.testing.assert_close(kernel.double(), exact @ exact.T, rtol=1e-4, atol=1e-4 * width)
        assert energy == pytest.approx(exact.square().sum().item() / 40, rel=1e-5)


def test_a_mean_that_is_too_large_and_features_too_faint_or_too_few_are_left_to_others() -> None:
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    assert centred_product(x + 1e4, False) is None
    assert centred_product(x * 1e-25, False) is None
    assert centred_product(x[:1], False) is None


def test_autocast_is_off_inside() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with exact_float32(x.device):
            assert (x @ x).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- threads


def threads_of_numpy():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


def test_numpys_products_run_on_the_calling_thread_and_its_threads_come_back():
    inside = []

    @one_thread()
    def fails():
        inside.extend(threads_of_numpy())
        raise ZeroDivisionError

    with threadpool_limits(2, user_api="blas"):
        before = threads_of_numpy()
        with pytest.raises(ZeroDivisionError):
            fails()
        assert threads_of_numpy() == before
    assert set(inside) == {1}
    assert set(before) == {2}


def test_the_networks_forwards_have_all_of_the_threads():
    seen = []
    target, guide = gpt2(layers=3), gpt2(layers=3)
    for network in (target, guide):
        network.transformer.register_forward_pre_hook(lambda *_: seen.extend(threads_of_numpy()))
    guidance = GuidanceLoss(target, guide)
    with threadpool_limits(2, user_api="blas"), guidance.watch(token_batch(4)) as watched:
        target(**watched.inputs)
        seen.extend(threads_of_numpy())
    assert len(watched.similarities["debiased_cka"]) == 3
    assert set(seen) == {2}


def test_one_inside_another_leaves_the_threads_to_the_outer_one():
    with threadpool_limits(2, user_api="blas"):
        with one_thread():
            with one_thread():
                assert set(threads_of_numpy()) == {1}
            assert set(threads_of_numpy()) == {1}
        assert set(threads_of_numpy()) == {2}


def _grams():
    gram(torch.randn(256, 4096))


def _features():
    x, y = torch.randn(2000, 500, requires_grad=True), torch.randn(2000, 500)
    linear_cka(x, y)


@pytest.mark.parametrize("work", [_grams, _features])
def test_a_similarity_is_all_the_work_of_the_calling_thread(work):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(2, user_api="blas"):
            work()
            time.sleep(0.3)  # a thread that is new waits busily at first
            began = time.process_time(), time.thread_time()
            for _ in range(20):
                work()
            process, thread = time.process_time() - began[0], time.thread_time() - began[1]
    finally:
        torch.set_num_threads(threads)
    assert process < 1.2 * thread  # of two threads, the other works or waits busily as long


def test_torch_takes_over_where_it_has_more_threads_than_numpys_one_makes_up_for():
    x, y = torch.randn(32, 300), torch.randn(32, 200)
    assert for_numpy(x)
    expected, threads = linear_cka(x, y), torch.get_num_threads()
    torch.set_num_threads(NUMPY_THREADS + 1)
    try:
        assert not for_numpy(x)
        assert linear_cka(x, y).item() == pytest.approx(expected.item(), abs=1e-6)
    finally:
        torch.set_num_threads(threads)
