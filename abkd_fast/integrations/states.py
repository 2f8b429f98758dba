"""A folder of hidden states in place of a teacher, for rows as transformers' Trainer has them."""

import datasets
import torch

from ..errors import ConfigError
from ..models import loading
from ..teacher.folder import StatesFolder
from ..teacher.shards import Rows
from ..teacher.store import Places
from ..teacher.teacher import CachedTeacher
from .rows import COLUMN, collate_rows

KEY = "hidden_states"


def find_states(folder: StatesFolder, rows: datasets.Dataset | None) -> tuple[Places, datasets.Dataset]:
    """The places of the rows' states, and the rows with the number of each.

    Raises ConfigError for rows that the states lack, and for states that are damaged.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ConfigError(f"{KEY}: train_dataset is a {type(rows).__name__}, expected a datasets.Dataset")
    packed = (collate_rows([row])["batch"].samples[0] for row in rows)
    samples = datasets.Dataset.from_list([*packed])
    folder.check()
    places = folder.find(samples, lambda index: f"train_dataset row {index + 1}", {})
    folder.verify()
    if COLUMN in rows.column_names:  # of another trainer
        rows = rows.remove_columns(COLUMN)
    return places, rows.add_column(COLUMN, [*range(len(rows))])


def cached_teacher(folder: StatesFolder, places: Places, dtype: torch.dtype, device: torch.device) -> CachedTeacher:
    """The teacher by its states and its output projection, in the student's type."""
    shape = loading.meta_model(loading.read_config(str(folder.folder))).get_output_embeddings().weight.shape
    head = tuple(None if part is None else part.to(device) for part in folder.head(shape, dtype))
    rows = Rows(folder.shards.map(), dtype)
    return CachedTeacher(rows, places, folder.samples, head, folder.logit_map, (folder.seconds, 0.0))
