"""Reading data: files and hub data sets become examples; errors carry file and line.

:func:`read_dataset` is the front door for training and evaluation, :func:`iter_texts` for texts to
predict on. Each format has a module of its own.
"""

from bitfit.data.config import FORMATS, SPLITS, DataConfig, Dataset, Format
from bitfit.data.inputs import iter_texts
from bitfit.data.reading import read_dataset
from bitfit.data.rows import BadRow
from bitfit.data.splits import dataset_hash, hold_out, take_limit

__all__ = [
    "FORMATS",
    "SPLITS",
    "BadRow",
    "DataConfig",
    "Dataset",
    "Format",
    "dataset_hash",
    "hold_out",
    "iter_texts",
    "read_dataset",
    "take_limit",
]
