"""Check and time attention by block table, as a vLLM step needs it, on a GPU.

1. The Triton path against the definition in PyTorch, with requests of different lengths in one step.
2. One new token for each of several long requests, against scaled dot product attention over dense keys and values in float16
   that are already contiguous, in one call: the best case of a dense cache.

The engine itself is measured by `benchmarks/vllm_engine.py`, which on a GPU requests the backend CUSTOM.

Example:

    python benchmarks/gpu_vllm.py --json docs/results/gpu_vllm.json
    TRITON_INTERPRET=1 python benchmarks/gpu_vllm.py --json gpu_vllm.json --smoke   # on a CPU, to see that the script runs
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tessera import codecs
from tessera.codecs.pages import block_layout, write
from tessera.evaluation.records import environment
from tessera.files import write_json
from tessera.kernels import paged
from tessera.kernels.paged import GROUP, BlockLayout, PagedCall, Step
from tessera.kernels.triton import triton_paged

HEADS, KV_HEADS, DIM = 32, 8, 128
#: The default codec, and scalar codecs.
CODECS = ("hqmq:4", "scalar:4", "int:4", "q4_0")
CASES = ((1, 4096), (1, 32768), (8, 4096), (32, 4096), (8, 32768))
#: Maximum relative error of correct kernels.
WRONG = 1e-2


class Served:
    """Requests in a pool, laid out as an engine does; one page of real codes is copied to all others.

    Args:
        lengths: lengths of the requests, in tokens.
        new: tokens of each request in the step.
        shape: query heads, key heads, head_dim.
        device: device of all tensors.
        spec: codec of the pages.
    """

    def __init__(self, lengths: list[int], new: int, shape: tuple[int, int, int], device: torch.device, spec: str) -> None:
        heads, kv_heads, dim = shape
        codec = codecs.get(spec)
        self.layout: BlockLayout = block_layout(codec, dim, torch.float16, pages=2, sink=4, heads=kv_heads)
        needed = [-(-n // self.layout.tokens) for n in lengths]
        self.pool = torch.zeros(sum(needed) + 1, kv_heads, self.layout.nbytes, dtype=torch.uint8, device=device)
        k, v = torch.randn(2, 2, kv_heads, GROUP, dim, device=device)
        both = torch.arange(2, device=device)
        write(codec, self.layout, self.pool, torch.zeros_like(both), both, k, v, both == 0)
        self.pool[1:] = self.pool[:1]
        table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        order = torch.randperm(sum(needed)) + 1
        for r, n in enumerate(needed):
            table[r, :n] = order[sum(needed[:r]) : sum(needed[:r]) + n]
        self.ring = torch.zeros(len(lengths), kv_heads, GROUP, self.layout.ring_bytes, dtype=torch.uint8, device=device)
        first = torch.arange(len(lengths) + 1).int() * new
        rings = torch.arange(len(lengths)).int()[:, None].to(device)
        self.step = Step(first, torch.tensor(lengths).int(), table.to(device), rings, {})
        count = new * len(lengths)
        self.q = torch.randn(count, heads, dim, dtype=torch.float16, device=device)
        self.k, self.v = torch.randn(2, count, kv_heads, dim, dtype=torch.float16, device=device)

    def attend(self, run: Any) -> Tensor:
        """Compute the step by `paged.attend_paged` or another implementation of it."""
        scale = self.q.shape[-1] ** -0.5
        return run(PagedCall(self.q, self.k, self.v, self.pool, self.ring, self.layout, self.step, scale))


def timed(run: Any, device: torch.device, repeats: int = 20) -> float:
    """Return the median milliseconds of a call."""
    times = []
    for i in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("docs/results/gpu_vllm.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, for a machine without a GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smoke:
        parser.error("there is no CUDA device; --smoke only shows that the script runs")
    shape = (2, 1, 32) if args.smoke else (HEADS, KV_HEADS, DIM)
    record: dict[str, Any] = {"environment": environment(), "rows": []}
    if device.type == "cuda":
        record["environment"]["device"] = torch.cuda.get_device_name()

    for spec, new in product(CODECS, (1, 5) if args.smoke else (1, 70)):
        served = Served([130, 200] if args.smoke else [700, 130, 1500], new, shape, device, spec)
        wanted = served.attend(paged.attend_paged)
        error = float((served.attend(triton_paged.attend_paged) - wanted).norm() / wanted.norm())
        record["rows"].append({"what": "error", "spec": spec, "new": new, "error": error, "right": error < WRONG})
        print(record["rows"][-1], flush=True)
    for (requests, tokens), spec in product(((2, 256),) if args.smoke else CASES, CODECS):
        served = Served([tokens] * requests, 1, shape, device, spec)
        heads, kv_heads, dim = shape
        k, v = torch.randn(2, requests, kv_heads, tokens, dim, dtype=torch.float16, device=device)
        q = served.q.view(requests, heads, 1, dim)
        repeats = 2 if args.smoke else 20
        ours = timed(lambda served=served: served.attend(triton_paged.attend_paged), device, repeats)
        dense = timed(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, enable_gqa=True), device, repeats)
        row = {"what": "step", "spec": spec, "requests": requests, "tokens": tokens, "ms": ours, "dense_ms": dense}
        record["rows"].append(row)
        print(record["rows"][-1], flush=True)
        write_json(args.json, record)
    write_json(args.json, record)


if __name__ == "__main__":
    main()
