"""Program of each of the two processes in `test_training_commands.py`, started by torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_training_loop import LOOP, make, sample

from tessera.cli import app
from tessera.lab.training.loop import train

out, words = Path(sys.argv[1]), sys.argv[2:]
rank = int(os.environ["RANK"])
model = make()
if rank:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
train(model, sample, LOOP, out / "loop", stop_at=3)
train(model, sample, LOOP, out / "loop")
save_file(dict(model.named_parameters()), out / f"rank{rank}.safetensors")
app(words, standalone_mode=False)
