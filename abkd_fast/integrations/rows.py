"""Rows as transformers' own collators have them, packed end to end."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.batches import collate
from ..errors import ConfigError

COLUMN = "hidden_states_row"  # the number of a row's states; a column "index" may be a user's own
NO_TOKENS = "expected input_ids and labels: tokenize the rows first, as docs/transformers-trainer.md shows"


def spans_of(labels: Sequence[int]) -> list[int]:
    """Where the trained tokens are: start and stop of each run of labels that are not -100. The first has no label."""
    is_trained = np.concatenate([[False, False], np.asarray(labels[1:]) != -100, [False]])
    return np.flatnonzero(is_trained[1:] != is_trained[:-1]).tolist()


def collate_rows(features: list[dict]) -> dict[str, Any]:
    """Packs rows {"input_ids", "labels"} end to end: labels as transformers has them, -100 where nothing is trained.

    Raises ValueError for a row without tokens or a label, and for labels that are not the row's own tokens.
    """
    batch = collate([_sample(row) for row in features])
    return {"batch": batch, "labels": batch.labels, "shift_labels": batch.labels}


def _sample(row: dict) -> dict:
    if "input_ids" not in row:
        raise ConfigError(f"a row has no input_ids; {NO_TOKENS}")
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    labels = ids if row.get("labels") is None else np.asarray(row["labels"], dtype=np.int64)
    if len(labels) != len(ids):
        raise ValueError(f"a row has {len(labels)} labels and {len(ids)} tokens, expected one for each token")
    if row.get("attention_mask") is not None:  # of rows that were padded before
        kept = np.flatnonzero(row["attention_mask"])
        ids, labels = ids[kept], labels[kept]
    wrong = np.flatnonzero((labels != -100) & (labels != ids))
    if len(wrong):
        problem = f"label {wrong[0]} of a row is {labels[wrong[0]]}, and its token {ids[wrong[0]]}"
        raise ValueError(f"{problem}; expected the token itself, not the next one, or -100")
    if not (spans := spans_of(labels)):
        raise ValueError(f"a row of {len(ids)} tokens has no token to train: all its labels are -100; leave it out")
    return {"input_ids": ids.tolist(), "spans": spans, **({"index": row[COLUMN]} if COLUMN in row else {})}
