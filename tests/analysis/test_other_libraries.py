"""The comparison of two networks agrees with other libraries, where these compute the same.

torch_cka takes the mean of HSIC over batches, which is right for batches of one size. netrep is on GitHub alone
(`pip install git+https://github.com/ahwillia/netrep`); its test is skipped where it is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from builders import seeded
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import KernelCenterer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_guidance.analysis import compare

ROWS, LAYERS = 48, ["0", "2", "4"]
Value = Callable[[np.ndarray, np.ndarray], float]


def network(width: int, seed: int) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 30), nn.ReLU(), nn.Linear(30, 7)), seed
    )


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(3))


A, B = network(60, 0), network(12, 1)  # more and fewer features than samples


def ours(measure: str, batch_size: int = ROWS) -> np.ndarray:
    rows = [{"input": row} for row in inputs()]
    loader: DataLoader = DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]
    return compare(A, B, loader, measure=measure, layers_a=LAYERS, layers_b=LAYERS).values


def by(value: Value) -> np.ndarray:
    """The values of another library on the features of each pair of layers."""
    with torch.no_grad():
        sides = [[net[: int(name) + 1](inputs()).double().numpy() for name in LAYERS] for net in (A, B)]
    return np.array([[value(x, y) for y in sides[1]] for x in sides[0]])


def of_kernels(one: np.ndarray, other: np.ndarray) -> float:
    one, other = (KernelCenterer().fit_transform(kernel) for kernel in (one, other))
    return float(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))


def gaussian(x: np.ndarray) -> np.ndarray:
    return pairwise_kernels(x, metric="rbf", gamma=1 / (2 * np.mean(pdist(x) ** 2)))


def penalty(x: np.ndarray, relative: float) -> float:
    return relative * float(np.sum((x - x.mean(0)) ** 2)) / len(x)


def ridge(x: np.ndarray, y: np.ndarray) -> float:
    predicted = Ridge(penalty(x, 0.1)).fit(x, y).predict(x)
    return float(r2_score(y, predicted, multioutput="variance_weighted"))


def leave_one_out(x: np.ndarray, y: np.ndarray) -> float:
    predicted = cross_val_predict(Ridge(penalty(x, 1.0)), x, y, cv=LeaveOneOut())
    others = (y.sum(0) - y) / (len(y) - 1)
    return float(1 - np.sum((y - predicted) ** 2) / np.sum((y - others) ** 2))


def similarities(x: np.ndarray, y: np.ndarray) -> float:
    return float(pearsonr(pdist(x - x.mean(0), "cosine"), pdist(y - y.mean(0), "cosine"))[0])


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("linear_cka", lambda x, y: of_kernels(x @ x.T, y @ y.T)),
        ("rbf_cka", lambda x, y: of_kernels(gaussian(x), gaussian(y))),
        ("ridge", ridge),
        ("ridge_loo", leave_one_out),
        ("rsa", similarities),
    ],
)
def test_the_values_are_those_of_scikit_learn_and_scipy(measure: str, value: Value) -> None:
    np.testing.assert_allclose(ours(measure), by(value), atol=1e-4)


@pytest.mark.trainers
@pytest.mark.parametrize("batch_size", [ROWS, ROWS // 4])
def test_debiased_cka_is_that_of_torch_cka_on_batches_of_one_size(batch_size: int) -> None:
    torch_cka = pytest.importorskip("torch_cka")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that were not named, and one loader for both
        other = torch_cka.CKA(A, B, "a", "b", LAYERS, LAYERS)
        with torch.no_grad():
            other.compare(DataLoader(TensorDataset(inputs()), batch_size=batch_size))
    np.testing.assert_allclose(ours("debiased_cka", batch_size), other.export()["CKA"], atol=1e-4)


@pytest.mark.trainers
def test_procrustes_and_cka_are_the_cosines_of_netreps_angles() -> None:
    metrics, found = pytest.importorskip("netrep.metrics"), pytest.importorskip("netrep.utils")
    angle = metrics.LinearMetric(alpha=1.0, center_columns=True, zero_pad=True, score_method="angular")
    np.testing.assert_allclose(ours("procrustes"), by(lambda x, y: np.cos(angle.fit_score(x, y))), atol=1e-3)

    def cka(x: np.ndarray, y: np.ndarray) -> float:
        kernels = [found.centered_kernel(side, metric="linear") for side in (x, y)]
        return float(np.cos(found.angular_distance(*kernels)))

    np.testing.assert_allclose(ours("linear_cka"), by(cka), atol=1e-5)
