"""A terminal that shows this project's words alone."""

from __future__ import annotations

import logging
import os
import warnings

import diffusers.utils.logging
import transformers.utils.logging

#: What libraries say in the course of things, and nobody who uses a command can act on.
NOISE = ("Removed shared tensor", "torch_dtype", "local_dir_use_symlinks")
#: Who says it (the second of `to`, which names no module), where it is no warning of Python.
LOGGERS = ("accelerate.utils.other", "diffusers.models.modeling_utils")


def hush_libraries() -> None:
    """No bars of weights that are loaded and written, and none of `NOISE`; other warnings stay."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    for words in NOISE:
        warnings.filterwarnings("ignore", message=f".*{words}")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # that library says errors before it raises them
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_no_noise)


def is_no_noise(record: logging.LogRecord) -> bool:
    """Whether a line of a log is worth showing."""
    return not any(words in record.getMessage() for words in NOISE)


def quiet_libraries() -> None:
    """No bars, hints and warnings at all of the libraries that load models: for commands that draw."""
    hush_libraries()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
