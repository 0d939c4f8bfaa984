"""`python -m tessera`, and with it `torchrun -m tessera`."""

from __future__ import annotations

from tessera.cli import main

# Processes that are spawned import this file too.
if __name__ == "__main__":
    main()
