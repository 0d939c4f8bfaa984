"""`python -m tessera`, and with it `torchrun -m tessera`."""

from __future__ import annotations

from tessera.cli import main

# Spawned processes import this file too.
if __name__ == "__main__":
    main()
