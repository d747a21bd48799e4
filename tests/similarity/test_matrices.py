"""Centring, norms and inner products of matrices, against numpy in float64."""

import numpy as np
import pytest
import torch

from hf_guidance.similarity.matrices import center, center_in_place, dot, inverse_norms, norms, u_center, unit


@pytest.fixture
def kernel() -> torch.Tensor:
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ x.T


def test_centring_is_that_by_the_centring_matrix(kernel: torch.Tensor) -> None:
    h = np.eye(7) - 1 / 7
    expected = h @ kernel.numpy() @ h
    np.testing.assert_allclose(center(kernel).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(center_in_place(torch.stack([kernel, 2 * kernel]))[1].numpy(), 2 * expected, atol=1e-12)


def test_u_centring_leaves_rows_that_sum_to_zero_and_no_diagonal(kernel: torch.Tensor) -> None:
    centred = u_center(kernel).numpy()
    np.testing.assert_allclose(centred.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.diag(centred), 0)
    n, a = 7, kernel.numpy() - np.diag(np.diag(kernel.numpy()))
    rows = a.sum(1, keepdims=True)
    expected = a - rows / (n - 2) - rows.T / (n - 2) + a.sum() / ((n - 1) * (n - 2))  # Székely & Rizzo 2014, eq. 2.2
    np.testing.assert_allclose(centred, expected - np.diag(np.diag(expected)), atol=1e-12)


def test_norms_and_dots_are_frobeniuss(kernel: torch.Tensor) -> None:
    size = np.linalg.norm(kernel.numpy())
    assert norms(kernel).item() == pytest.approx(size, rel=1e-12)
    assert inverse_norms([kernel, 3 * kernel])[1].item() == pytest.approx(1 / (3 * size), rel=1e-12)
    assert norms(unit(kernel)).item() == pytest.approx(1, rel=1e-12)
    assert dot(kernel, kernel).item() == pytest.approx(size**2, rel=1e-12)


def test_many_squares_in_float32_keep_their_digits() -> None:
    many = torch.rand(2000, 2000, generator=torch.Generator().manual_seed(0))
    exact = (many.numpy().astype(np.float64) ** 2).sum()
    assert dot(many, many).item() == pytest.approx(exact, rel=2e-6)
    assert norms(many).item() == pytest.approx(exact**0.5, rel=2e-6)


def test_a_matrix_that_is_zero_up_to_rounding_becomes_zero() -> None:
    assert unit(torch.full((4, 4), 1e-9)).count_nonzero() == 0
    assert inverse_norms([torch.zeros(4, 4)]).item() == 0
