"""What a command says: its own words, once, and not the libraries' bars and warnings."""

from __future__ import annotations


def quiet() -> None:
    """Silence transformers' progress bars and everything below an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
