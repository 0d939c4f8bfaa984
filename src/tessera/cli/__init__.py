"""The `tessera` command: one file per sub-command, put together here."""

from tessera.cli.app import app, main

__all__ = ["app", "main"]
