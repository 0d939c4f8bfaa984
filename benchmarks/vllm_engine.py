"""vLLM with packed pages against its own dense and fp8 caches: what the pool holds, how fast it answers, what it says.

Each cache is measured in processes of its own, one after the other in rounds, so that a disturbance of the machine meets all
of them; times are medians over the rounds. Quality is the divergence of the engine's distribution of every next token of a
text, read in chunks, from that of the engine with the dense cache.

Run it with the Python that has vLLM (`make test-vllm` makes one in .venv-vllm).

Example:

    .venv-vllm/bin/python benchmarks/vllm_engine.py --model path/to/SmolLM2-135M-Instruct --text book.txt
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Specifications of Tessera's that are measured, and what vLLM's own caches are called here.
SPECS = ("sink:4 + hqmq:4", "sink:1 + hqmq:4", "sink:4 + hqmq:3")
DENSE, FP8 = "dense", "fp8"
#: Lengths of requests, in tokens, for which it is said how many the pool holds.
LENGTHS = (1024, 4096, 8192)
#: Query heads, key heads, head_dim of layers, and requests, tokens and new tokens of steps, whose attention is timed by itself.
SHAPES = ((9, 3, 64), (32, 8, 128))
STEPS = ((1, 4096, 1), (8, 4096, 1), (32, 1024, 1), (32, 4096, 1), (1, 2048, 2048))
#: What a small pool is: enough for every workload in the dense cache.
POOL = 1 << 31


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--text", required=True, type=Path, help="a text of at least 40,000 words")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2721, help="of text that quality is measured on")
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a request's prompt")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long request's prompt")
    parser.add_argument("--few", type=int, default=4, help="long requests at once")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "vllm_engine.json")
    parser.add_argument("--caches", nargs="+", default=[DENSE, FP8, *SPECS], help="'dense', 'fp8' and specifications")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("speed", "quality", "kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--scores", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace, **options: Any) -> Any:
    """An engine with the cache that is asked for."""
    from vllm import LLM

    usual: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": max(args.long, args.prompt) + args.new + 64,
        "max_num_seqs": args.requests,
        "kv_cache_memory_bytes": POOL,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    if args.cache == FP8:
        usual["kv_cache_dtype"] = "fp8"
    elif args.cache != DENSE:
        usual["additional_config"] = {"tessera": args.cache}
    return LLM(model=args.model, **{**usual, **options})


def pieces(llm: Any, text: Path, count: int, size: int) -> list[list[int]]:
    """Prompts of `size` tokens, different from each other."""
    tokens = llm.get_tokenizer().encode(text.read_text(encoding="utf-8")[: 12 * count * size])
    step = (len(tokens) - size) // max(1, count)
    return [tokens[i * step : i * step + size] for i in range(count)]


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Blocks in the pool, and seconds to first tokens and for the tokens after it."""
    from vllm import SamplingParams

    llm = start(args)
    config = llm.llm_engine.vllm_config.cache_config
    found: dict[str, Any] = {"blocks": config.num_gpu_blocks, "block_size": config.block_size, "pool": POOL}
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    found["rings"] = len(groups) - 1  # of a model without windows: all groups but that of its attention
    engine = llm.llm_engine
    serial = count()

    def run(prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Seconds until the first and until the last first token, and tokens a second once all requests write."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for prompt in prompts:
            engine.add_request(f"request-{next(serial)}", {"prompt_token_ids": prompt}, params)
        began = time.perf_counter()
        arrived: dict[str, float] = {}
        written, spent = 0, 0.0
        while engine.has_unfinished_requests():
            reading = len(arrived) < len(prompts)
            before = time.perf_counter()
            answers = engine.step()
            now = time.perf_counter()
            for answer in answers:
                arrived.setdefault(answer.request_id, now - began)
            if not reading:
                written += len(answers)
                spent += now - before
        return {
            "first": min(arrived.values()),
            "all_first": max(arrived.values()),
            "tokens_per_second": written / spent if spent else 0.0,
        }

    many, long = pieces(llm, args.text, args.requests, args.prompt), pieces(llm, args.text, args.few, args.long)
    run(many[:1], 2)
    found["many"] = run(many, 1 + args.new)
    found["long"] = run(long, 1 + args.new)
    found["first_token"] = run(long[:1], 1)["first"]
    return found


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Divergence from the dense cache, whose scores are in a file; the dense cache writes it."""
    import torch
    from vllm import SamplingParams

    kept: list[torch.Tensor] = []

    def listen(model: Any) -> None:
        compute = model.compute_logits

        def heard(*given: Any, **more: Any) -> Any:
            logits = compute(*given, **more)
            if logits is not None and len(logits) > 1:
                kept.append(logits.float().log_softmax(-1))
            return logits

        model.compute_logits = heard

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = start(args, max_num_batched_tokens=256, max_num_seqs=1, max_model_len=args.tokens + 64)
    prompt = pieces(llm, args.text, 1, args.tokens)[0]
    llm.apply_model(listen)
    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scores = torch.cat(kept)[: args.tokens - 1]
    target = torch.tensor(prompt[1 : len(scores) + 1])
    found = {"tokens": len(scores), "perplexity": float((-scores.gather(1, target[:, None])).mean().exp())}
    if args.cache == DENSE:
        torch.save(scores, args.scores)
    else:
        dense = torch.load(args.scores, weights_only=True)
        found["kl"] = float((dense.exp() * (dense - scores)).sum(-1).mean())
        found["top1"] = float((dense.argmax(-1) == scores.argmax(-1)).float().mean())
    return found


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """One layer's attention of a step, by block table: packed pages and vLLM's dense kernel, interleaved in one process."""
    import torch
    import vllm._C  # noqa: F401
    from vllm import _custom_ops as ops

    from tessera import codecs
    from tessera.codecs.pages import block_layout, write
    from tessera.kernels import paged
    from tessera.kernels.cpu.paged import attend_paged
    from timing import medians

    dtype, size = torch.bfloat16, 128
    rows = []
    for heads, kv_heads, dim in SHAPES:
        for requests, length, new in STEPS:
            blocks = -(-length // size)
            codec = codecs.get("hqmq:4")
            layout = block_layout(codec, dim, dtype, pages=2, sink=4, heads=kv_heads)
            pool = torch.zeros(requests * blocks + 1, kv_heads, layout.nbytes, dtype=torch.uint8)
            two = torch.arange(2)
            write(codec, layout, pool, two * 0, two, *torch.randn(2, 2, kv_heads, 64, dim), two == 0)
            pool[1:] = pool[:1]
            dense = torch.randn(1, kv_heads, 2 * size, dim).to(dtype).repeat(len(pool), 1, 1, 1)
            ring = torch.zeros(requests, kv_heads, 64, layout.ring_bytes, dtype=torch.uint8)
            table = (torch.randperm(requests * blocks) + 1).int().view(requests, blocks)
            first, lengths = torch.arange(requests + 1).int() * new, torch.full((requests,), length).int()
            step = paged.Step(first, lengths, table, torch.arange(requests).int()[:, None], {})
            q = torch.randn(requests * new, heads, dim).to(dtype)
            k, v = torch.randn(2, requests * new, kv_heads, dim).to(dtype)
            out, scale = torch.empty_like(q), dim**-0.5
            shape = {"num_reqs": requests, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "dtype": dtype}
            where = {"query_start_loc": first, "seq_lens": lengths, "causal": True, "kv_cache_dtype": "auto"}
            plan = ops.cpu_attn_get_scheduler_metadata(
                **shape, **where, sliding_window_size=-1, isa="vec", enable_kv_split=True, dynamic_causal=None
            )
            keys, values = dense.chunk(2, dim=2)
            given = {"query": q, "key_cache": keys, "value_cache": values, "output": torch.empty_like(q), "block_table": table}
            given |= {"alibi_slopes": None, "sliding_window": -1, "softcap": 0.0, "scheduler_metadata": plan, "s_aux": None}
            given |= {**where, "scale": scale}
            seconds = medians(
                {
                    "packed": lambda a=(q, k, v, pool, ring, layout, step, scale), out=out: attend_paged(*a, out=out),
                    "dense": lambda given=given: ops.cpu_attention_with_kv_cache(**given),
                },
                repeats=7,
            )
            rows.append({"shape": f"{heads},{kv_heads},{dim}", "requests": requests, "tokens": length, "new": new, **seconds})
    return {"rows": rows}


def instructions() -> list[str]:
    """Sets of vector instructions that the processor has."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("flags")
        )
    except (OSError, StopIteration):
        return []
    return [flag for flag in flags.split() if flag.startswith(("avx", "amx", "fma", "f16c"))]


def child(args: argparse.Namespace, cache: str, what: str, scores: Path) -> dict[str, Any]:
    """One measurement in a process of its own; what went wrong there is said in its place."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        given = {"--model": args.model, "--text": args.text, "--dtype": args.dtype, "--tokens": args.tokens, "--new": args.new}
        given |= {"--few": args.few, "--requests": args.requests, "--prompt": args.prompt, "--long": args.long}
        given |= {"--cache": cache, "--what": what, "--scores": scores, "--json": out.name}
        command = [sys.executable, __file__, *(str(word) for pair in given.items() for word in pair)]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            return {"error": lines[-1].strip() if lines else f"exit {done.returncode}"}
        return json.loads(Path(out.name).read_text())


def tokens_held(row: dict[str, Any], length: int) -> int:
    """Tokens of requests of one length that the pool holds at once."""
    blocks = -(-length // row["block_size"]) + row["rings"]
    return (row["blocks"] - 1) // blocks * length


def main() -> None:
    """Measure all, or in a child process one."""
    args = parse()
    if args.cache:
        found = {"speed": speed, "quality": quality, "kernels": kernels}[args.what](args)
        args.json.write_text(json.dumps(found))
        return
    import torch
    import vllm

    from tessera.evaluation.records import environment
    from tessera.files import atomic_path

    caches = args.caches
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.pt"
        for cache in caches:
            rows[cache] = {"quality": child(args, cache, "quality", scores), "rounds": []}
            print(cache, rows[cache]["quality"], flush=True)
        for _ in range(args.rounds):
            for cache in caches:
                rows[cache]["rounds"].append(child(args, cache, "speed", scores))
                print(cache, rows[cache]["rounds"][-1], flush=True)
    result = []
    for cache in caches:
        rounds = [one for one in rows[cache]["rounds"] if "error" not in one]
        row = {"cache": cache, **rows[cache]["quality"]}
        if rounds:
            row |= {name: rounds[0][name] for name in ("blocks", "block_size", "rings", "pool")}
            row["held"] = {str(n): tokens_held(rounds[0], n) for n in LENGTHS}
            row["first_token"] = median(one["first_token"] for one in rounds)
            for name in ("many", "long"):
                row[name] = {key: median(one[name][key] for one in rounds) for key in rounds[0][name]}
        else:
            row["error"] = rows[cache]["rounds"][0]["error"]
        result.append(row)
    record = {
        "environment": {
            **environment(),
            "vllm": vllm.__version__,
            "instructions": instructions(),
            "threads": torch.get_num_threads(),
        },
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "requests": args.requests,
        "prompt": args.prompt,
        "long": args.long,
        "few": args.few,
        "new": args.new,
        "rows": result,
        "kernels": child(args, DENSE, "kernels", Path())["rows"],
    }
    with atomic_path(args.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
