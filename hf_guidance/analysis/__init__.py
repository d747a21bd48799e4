"""Analysis of runs: a look at their first batch, curves of their logs, and maps of the similarity of all layers.

`first_batch` looks at the first batch, and `history` reads a Trainer's log. `similarity_map` compares all layers on one
batch, and `network_comparison` those of any two networks over a dataset. `curves`, `heat_maps` and `film` draw them.
`errors` tells whether two networks err alike, and `dimensions` the dimension of a layer's features.
"""

from hf_guidance.analysis.comparison_values import SAMPLE_WORDS, Comparison
from hf_guidance.analysis.curves import plot_comparison, plot_curves, plot_run
from hf_guidance.analysis.dimensions import intrinsic_dimension
from hf_guidance.analysis.errors import error_consistency, error_consistency_matrix, plot_error_consistency
from hf_guidance.analysis.figures import save
from hf_guidance.analysis.film import plot_film
from hf_guidance.analysis.first_batch import (
    DEBIASED,
    MAX_ROWS,
    TOP,
    FirstLook,
    LayerLook,
    PairLook,
    look_at_layer,
    look_at_pairs,
    render,
)
from hf_guidance.analysis.first_warnings import FULL, HELPED, LARGE_SHARE, named, warnings_of
from hf_guidance.analysis.heat_maps import plot_matrix, plot_similarity_maps
from hf_guidance.analysis.history import (
    DIMENSION,
    Curves,
    History,
    SimilarityMap,
    debiased_curve,
    debiased_curves,
    dimension_curves,
    gradient_curve,
    metrics_of,
    run_in_words,
    similarity_curves,
    training_curve,
    validation_curve,
)
from hf_guidance.analysis.network_comparison import compare
from hf_guidance.analysis.runs import colours_of, label_of

__all__ = [
    "DEBIASED",
    "DIMENSION",
    "FULL",
    "HELPED",
    "LARGE_SHARE",
    "MAX_ROWS",
    "SAMPLE_WORDS",
    "TOP",
    "Comparison",
    "Curves",
    "FirstLook",
    "History",
    "LayerLook",
    "PairLook",
    "SimilarityMap",
    "colours_of",
    "compare",
    "debiased_curve",
    "debiased_curves",
    "dimension_curves",
    "error_consistency",
    "error_consistency_matrix",
    "gradient_curve",
    "intrinsic_dimension",
    "label_of",
    "look_at_layer",
    "look_at_pairs",
    "metrics_of",
    "named",
    "plot_comparison",
    "plot_curves",
    "plot_error_consistency",
    "plot_film",
    "plot_matrix",
    "plot_run",
    "plot_similarity_maps",
    "render",
    "run_in_words",
    "save",
    "similarity_curves",
    "training_curve",
    "validation_curve",
    "warnings_of",
]
