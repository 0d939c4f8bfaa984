"""Suppression of the libraries' progress bars and warnings in commands."""

from __future__ import annotations


def quiet() -> None:
    """Silence transformers' progress bars and everything below an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
