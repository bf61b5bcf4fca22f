"""The exceptions that bitfit raises on purpose.

::

    BitfitError                  exit code 1
    ├── UsageError               exit code 2: an argument that cannot be meant
    │   ├── UnknownTerm          a bias term that this base does not have
    │   ├── UnknownTask          a task that is not in the bank or not built in
    │   └── MissingExtra         a feature whose optional dependency is not installed
    ├── DataError                a file of data that cannot be read; says file, line and expectation
    ├── BaseModelError           a base model that cannot be found, read or used
    │   └── NoBiases             a base without a single bias to tune
    ├── TaskFileError            a task file that is refused
    │   ├── UnreadableTaskFile   its bytes cannot be had: not there, no permission, no connection
    │   ├── CorruptTaskFile      truncated, altered, oversized, or not a task file at all
    │   ├── UnsupportedFormat    written in a format newer than this version reads
    │   ├── WrongBase            made for another base model
    │   └── WrongTokenizer       made with another tokenizer
    ├── NotWritten               a file that cannot be written: no space, no permission
    ├── TrainingDiverged         the loss became NaN or infinite
    └── TrainingInterrupted      stopped by the user; says how to go on
"""

from __future__ import annotations


class BitfitError(Exception):
    """Base of every error that bitfit raises on purpose."""

    exit_code = 1


class UsageError(BitfitError):
    """An argument that cannot be meant: the message names it and what was expected.

    Args:
        message: what is wrong.
        field: the argument that the message names as the library calls it, such as
            ``learning_rate``; the command line puts its own name there (``--lr``).
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownTerm(UsageError):
    """A bias term that does not exist, or that this base does not have."""


class UnknownTask(UsageError):
    """A task name that nothing is known under. Never answered by the base instead."""


class MissingExtra(UsageError):
    """A feature needs an optional dependency; the message holds the install command."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'bitfit[{extra}]'")


class DataError(BitfitError):
    """Data that cannot be read. The message starts with ``file:line:`` where there is one."""


class BaseModelError(BitfitError):
    """A base model that cannot be found, read or used."""


class NoBiases(BaseModelError):
    """A base without biases: tuning them would silently train the head only."""


class TaskFileError(BitfitError):
    """A task file that is refused; the message says what differs."""


class UnreadableTaskFile(TaskFileError):
    """A task file whose bytes cannot be had, perhaps only now."""


class CorruptTaskFile(TaskFileError):
    """A file that is truncated, altered, oversized or not a task file."""


class UnsupportedFormat(TaskFileError):
    """A task file of a format newer than this version reads."""


class WrongBase(TaskFileError):
    """A task file made for another base; the message names the first tensor that differs."""


class WrongTokenizer(TaskFileError):
    """A task file made with another tokenizer than the one of this base."""


class CheckpointRefused(BitfitError):
    """A saved state that is damaged, or of a run with other settings or data."""


class NotWritten(BitfitError):
    """A file that cannot be written; the message has its path and the system's reason."""


class TrainingDiverged(BitfitError):
    """The loss became NaN or infinite; the message says at which step and what to try."""


class TrainingInterrupted(BitfitError):
    """Training was stopped by the user after its state was saved."""

    exit_code = 130
