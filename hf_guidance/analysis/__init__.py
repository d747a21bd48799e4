"""Analysis of runs: a look at their first batch, curves of their logs, and maps of the similarity of all layers.

`first_batch` looks at the first batch, and `history` reads a Trainer's log. `similarity_map` compares all layers on one
batch, and `network_comparison` those of any two networks over a dataset. `curves`, `heat_maps` and `film` draw them.
`errors` tells whether two networks err alike, and `dimensions` the dimension of a layer's features.
"""

from hf_guidance.analysis.comparison_values import Comparison
from hf_guidance.analysis.curves import plot_comparison, plot_curves, plot_run
from hf_guidance.analysis.dimensions import intrinsic_dimension
from hf_guidance.analysis.errors import error_consistency, error_consistency_matrix, plot_error_consistency
from hf_guidance.analysis.film import plot_film
from hf_guidance.analysis.first_batch import FirstLook
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.analysis.history import (
    Curves,
    History,
    SimilarityMap,
    metrics_of,
    similarity_curves,
    training_curve,
    validation_curve,
)
from hf_guidance.analysis.network_comparison import compare

__all__ = [
    "Comparison",
    "Curves",
    "FirstLook",
    "History",
    "SimilarityMap",
    "compare",
    "error_consistency",
    "error_consistency_matrix",
    "intrinsic_dimension",
    "metrics_of",
    "plot_comparison",
    "plot_curves",
    "plot_error_consistency",
    "plot_film",
    "plot_run",
    "plot_similarity_maps",
    "similarity_curves",
    "training_curve",
    "validation_curve",
]
