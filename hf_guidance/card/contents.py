"""The facts of a run, section by section, that a model card is made of."""

from __future__ import annotations

from typing import Any, TypedDict

Values = dict[str, Any]  # names as a reader sees them, with what is shown beside


class Network(TypedDict, total=False):
    """Target or guide; only a guide has a fingerprint and a batch norm that is told."""

    architecture: str
    parameters: int
    sizes: Values
    source: str | None
    revision: str | None
    untrained: bool | None
    seed: int | None
    own_code: bool
    fingerprint: str
    config: Values | None
    timm: str
    batch_norm: bool
    own_base: bool


class Results(TypedDict, total=False):
    """Metrics of one split; `best_step` where the weights are not those of the last step."""

    split: str
    values: dict[str, float]
    best_step: int | None


class PairRow(TypedDict):
    """Similarity of one pair in the first and the last log, and its debiased CKA in the last one.

    None where LayerDrop skipped its target layer, or where debiased CKA was not logged beside the measure.
    """

    target: str
    guide: str
    first: float | None
    last: float | None
    debiased: float | None


class Pairs(TypedDict):
    """Similarity of every pair, and the steps of the logs: the first, the one before the last, the last."""

    first: int
    before_last: int
    last: int
    rows: list[PairRow]


class MatchedRuns(TypedDict, total=False):
    """The runs that this one is matched with."""

    text: str
    table: str
    seeds: int


class Figure(TypedDict):
    """A picture beside the card."""

    file: str
    caption: str


class Example(TypedDict, total=False):
    """A text to show the network in use with."""

    text: str
    copies: bool


class RunFacts(TypedDict, total=False):
    """All that is known of a run; a section without facts is not in the card."""

    name: str
    repository: str
    folder: str
    license: str
    language: str | list[str]
    tags: list[str]
    target: Network
    guide: Network
    guidance: Values
    stopped_at: int
    pairs: Pairs
    results: Results
    comparison: MatchedRuns
    figures: list[Figure]
    training: Values
    cost: Values
    emissions: float
    data: Values
    example: Example
    dashboard: str
    command: str
    command_is_cut: bool
    versions: dict[str, str]
