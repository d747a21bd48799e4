"""Splits of a dataset from the Hub or a folder; what `datasets` raises is said in words that tell what to do."""

from __future__ import annotations

import os
import textwrap
from typing import Any


def read_splits(dataset: str, config: str | None, streaming: bool) -> dict[str, Any]:
    """Load the splits of a dataset from the Hub or a local folder.

    Args:
        dataset: Hub id or folder.
        config: Name of its configuration, if it has several.
        streaming: Whether to stream the dataset instead of downloading it first.

    Raises:
        ValueError: If the dataset is missing, gated or damaged, or has no such configuration.
        ConnectionError: If the Hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.constants import ENDPOINT

    try:
        return dict(load_dataset(dataset, config, streaming=streaming))
    except Exception as error:  # of `datasets`, of the Hub's client, or of a reader of files
        said = textwrap.shorten(str(error), 300)
        if "gated" in str(error) and isinstance(error, DatasetNotFoundError):
            raise ValueError(
                f"the dataset {dataset} is gated: accept its terms at {ENDPOINT}/datasets/{dataset}, create a token "
                f"with read rights at {ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
            ) from error
        if isinstance(error, FileNotFoundError) or (dataset.startswith(("/", ".", "~")) and not os.path.isdir(dataset)):
            raise ValueError(
                f"dataset {dataset!r} not found: it is no local folder with data (seen from {os.getcwd()}), and the "
                "Hub has no dataset of that name that this user may read (for a private one run `hf auth login` or set "
                "HF_TOKEN)."
            ) from error
        if isinstance(error, ConnectionError):
            raise ConnectionError(
                f"the dataset {dataset!r} could not be loaded: {said}. Try again later, or name a folder."
            ) from error
        raise ValueError(
            f"the dataset {dataset!r} cannot be read ({type(error).__name__}: {said}). Check its files and "
            "the name of its configuration (dataset_config)."
        ) from error
