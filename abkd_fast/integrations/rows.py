"""Rows as transformers' own collators have them, packed end to end."""

from typing import Any

import numpy as np

from ..data.batches import collate


def spans_of(labels: list[int]) -> list[int]:
    """Where the trained tokens are: start and stop of each run of labels that are not -100. The first has no label."""
    is_trained = np.concatenate([[False, False], np.asarray(labels[1:]) != -100, [False]])
    return np.flatnonzero(is_trained[1:] != is_trained[:-1]).tolist()


def collate_rows(features: list[dict]) -> dict[str, Any]:
    """Packs rows {"input_ids", "labels"} end to end: labels as transformers has them, -100 where nothing is trained.

    Raises ValueError for a row without a label.
    """
    samples = []
    for row in features:
        ids, labels = [*map(int, row["input_ids"])], row.get("labels")
        if "attention_mask" in row:  # of rows that were padded before
            kept = np.flatnonzero(row["attention_mask"])
            ids, labels = (
                [ids[place] for place in kept],
                labels if labels is None else [labels[place] for place in kept],
            )
        spans = [1, len(ids)] if labels is None else spans_of(labels)
        if len(ids) < 2 or not spans:
            raise ValueError(f"a row of {len(ids)} tokens has no token to train: all its labels are -100; leave it out")
        samples.append({"input_ids": ids, "spans": spans, **({"index": row["index"]} if "index" in row else {})})
    batch = collate(samples)
    return {"batch": batch, "labels": batch.labels, "shift_labels": batch.labels}
