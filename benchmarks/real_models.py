"""Measure caches on SmolLM2-135M-Instruct, and on the same model with rescaled keys: docs/results/real_models.

Three runs of `tessera compare`, some hours on two cores. The model is downloaded as `make demo-real` does. The paper protocol
reads both models; generation's, which takes long, the first.

Example:

    python benchmarks/real_models.py --text wikitext-2-valid.txt
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import real_model
import rescaled_keys
from tessera.cli import app

RESULTS = real_model.ROOT / "docs" / "results" / "real_models"
#: The specifications of each run.
OURS = ("hqmq:3", "hqmq:3.5", "hqmq:4", "hqmq:5")
OTHERS = ("hqmq:4_nostats", "hqmq:s96_r4", "scalar:4", "q4_0", "int:4", "kivi:4", "fp8")
MORE = ("hqmq:k4.5v3.5", "hqmq:k3.5v2.5", "hqmq:s24_r2", "hqmq:s192_r6_med3", "scalar:3", "int:3")


def main() -> int:
    """Fetch the model, rescale a copy of it, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text; the figures of the documents are of WikiText-2, valid")
    parser.add_argument("--models", type=Path, default=real_model.ROOT / "results" / "models")
    options = parser.parse_args()
    file = real_model.fetch(options.models)
    plain, rescaled = options.models / "smollm2", options.models / "rescaled"
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for folder in (plain, rescaled):
        if folder == rescaled:
            rescaled_keys.rescale(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    text = [] if options.text is None else ["--text", str(options.text)]
    paper = [f"sink:4 + {codec}" for codec in (*OURS, *MORE, *OTHERS)]
    long = [[f"sink:4 + {codec} + recent:128" for codec in codecs] for codecs in (OURS, OTHERS)]
    long[1].append("sink:4 + window:2048")
    generation = ["--context", "8192", "--windows", "1", "--chunk", "512"]
    measure("paper", [*text, "--model", str(rescaled), "--context", "512"], plain, paper)
    measure("streaming_a", [*text, *generation], plain, long[0])
    measure("streaming_b", [*text, *generation], plain, long[1])
    return 0


def measure(name: str, options: list[str], model: Path, specs: list[str]) -> None:
    """Run `tessera compare` once, and keep its record under a name."""
    with tempfile.TemporaryDirectory() as folder:
        protocol = name.partition("_")[0]
        words = ["compare", "--model", str(model), "--protocol", protocol, "--out", folder, *options, "--specs", *specs]
        app(words, standalone_mode=False)
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "compare.json", RESULTS / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
