"""Whose threads Gram matrices are computed on."""

import time

import pytest
import torch
from builders import gpt2, token_batch
from hf_guidance.similarity.grams import gram
from hf_guidance.similarity.narrow import Thin
from hf_guidance.similarity.numpy_products import MOST_THREADS, for_numpy, one_thread
from threadpoolctl import ThreadpoolController, threadpool_limits

from hf_guidance import GuidanceLoss
from hf_guidance.similarity.measures import get_measure, linear_cka
from hf_guidance.similarity.pair_loss import guidance_loss


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
    assert len(watched.similarities["linear_cka"]) == 3
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
    kernels = Thin.apply(x.dtype, x, y)
    guidance_loss([("t", "g")], get_measure("linear_cka"), {"t": kernels[0]}, {"g": kernels[1].detach()})


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
    torch.set_num_threads(MOST_THREADS + 1)
    try:
        assert not for_numpy(x)
        assert linear_cka(x, y).item() == pytest.approx(expected.item(), abs=1e-6)
    finally:
        torch.set_num_threads(threads)
