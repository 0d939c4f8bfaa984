"""Compare vLLM with packed pages to its own dense and fp8 caches: capacity of the pool, speed and quality.

Each cache has an engine in a separate process. The engines step alternately, so that a disturbance of the machine affects all
of them; times are of an engine's own steps, medians over steps and rounds. Quality is the divergence of the engine's next-token
distributions over a text, read in chunks, from those of the engine with the dense cache, and how well it reads a list of words
a second time, by the engine's own log-probabilities.

Run it in an environment with vLLM (`make test-vllm` creates .venv-vllm).

Example:

    .venv-vllm/bin/python benchmarks/vllm_engine.py --model path/to/SmolLM2-135M-Instruct --text book.txt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: The measured specifications of Tessera, and the names used here for vLLM's own caches.
SPECS = ("sink:4 + hqmq:4", "sink:4 + hqmq:4, with statistics", "sink:4 + hqmq:3")
DENSE, FP8 = "dense", "fp8"
#: Suffix of specifications whose keys are coded with statistics measured at the end of the text.
STATS = ", with statistics"
#: Lengths of requests, in tokens, for which the pool's capacity is computed.
LENGTHS = (1024, 4096, 8192)
#: Shapes for timing attention alone: query heads, key heads and head_dim; requests, tokens and new tokens of a step.
SHAPES = ((9, 3, 64), (32, 8, 128))
STEPS = ((1, 4096, 1), (8, 4096, 1), (32, 1024, 1), (32, 4096, 1), (1, 2048, 2048))
#: Size of a small pool, enough for every workload in the dense cache.
POOL = 1 << 30


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--text", required=True, type=Path, help="a text of at least 40,000 words")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2721, help="length of the text that quality is measured on")
    parser.add_argument("--lists", type=int, default=4, help="number of lists of 300 words in the task")
    parser.add_argument("--requests", type=int, default=32, help="concurrent requests")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a request's prompt")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long request's prompt")
    parser.add_argument("--few", type=int, default=4, help="concurrent long requests")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=256, help="tokens per block")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "vllm_engine.json")
    parser.add_argument("--caches", nargs="+", default=[DENSE, FP8, *SPECS], help="'dense', 'fp8' and specifications")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("serve", "quality", "kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--scores", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stats", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace, **options: Any) -> Any:
    """Start an engine with this cache."""
    import torch
    from vllm import LLM

    usual: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": max(args.long, args.prompt) + args.new + 64,
        "max_num_seqs": args.requests,
        "kv_cache_memory_bytes": POOL,
        "block_size": args.block_size,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    if args.cache == FP8:
        usual["kv_cache_dtype"] = "fp8"
    elif args.cache != DENSE:
        usual["additional_config"] = {"tessera": args.cache.removesuffix(STATS)}
        if args.cache.endswith(STATS):
            usual["additional_config"]["tessera_stats"] = str(args.stats)
        if torch.cuda.is_available():  # the CPU platform has a single backend
            usual["attention_backend"] = "CUSTOM"
    return LLM(model=args.model, **{**usual, **options})


def pieces(llm: Any, text: Path, count: int, size: int) -> list[list[int]]:
    """Return different prompts of `size` tokens."""
    tokens = llm.get_tokenizer().encode(text.read_text(encoding="utf-8")[: 12 * count * size])
    step = (len(tokens) - size) // max(1, count)
    return [tokens[i * step : i * step + size] for i in range(count)]


def serve(args: argparse.Namespace) -> None:
    """Run an engine that is stepped from outside: answer each line of the input with a line of JSON.

    A line is the name of a workload, whose requests are added, "step", or "end".
    """
    import torch
    from vllm import SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own output must not mix with the answers
    llm = start(args)
    engine, serial = llm.llm_engine, count()
    workloads = {
        "many": (pieces(llm, args.text, args.requests, args.prompt), 1 + args.new),
        "long": (pieces(llm, args.text, args.few, args.long), 1 + args.new),
        "first": (pieces(llm, args.text, 1, args.long), 1),
    }

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    config = engine.vllm_config.cache_config
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    # Without sliding windows, all cache groups but one are rings.
    pool = {"blocks": config.num_gpu_blocks, "block_size": config.block_size, "pool": POOL, "rings": len(groups) - 1}
    answer({**pool, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        asked = line.strip()
        if asked == "end":
            break
        if asked in workloads:
            prompts, tokens = workloads[asked]
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            for prompt in prompts:
                engine.add_request(f"request-{next(serial)}", {"prompt_token_ids": prompt}, params)
            answer({"requests": len(prompts)})
            continue
        began = time.perf_counter()
        wrote = [one.request_id for one in engine.step()]
        answer({"seconds": time.perf_counter() - began, "wrote": wrote, "more": engine.has_unfinished_requests()})


class Engine:
    """One of the alternating engines, in a separate process.

    Attributes:
        cache: its cache.
        pool: properties of its pool, or the error at start, as "error".
    """

    def __init__(self, args: argparse.Namespace, cache: str) -> None:
        self.cache = cache
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                command(args, cache, "serve"),
                env=environment_of_children(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                self.pool: dict[str, Any] = self._heard()
            except EOFError:
                log.seek(0)
                self.pool = {"error": complaint(log.read(), self.process.wait())}

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line to the engine and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the engine with {self.cache!r} has ended")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        if "error" not in self.pool:
            self.process.stdin.write("end\n")
        self.process.stdin.close()
        self.process.wait()


def speed(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure, by cache, the pool's capacity, and the seconds until first tokens and of later steps."""
    engines = [Engine(args, cache) for cache in args.caches]
    running = [one for one in engines if "error" not in one.pool]
    found = {one.cache: dict(one.pool) for one in engines}
    one_round(running, "first")  # the first use of memory pages is slow
    for workload in ("first", "many", "long"):
        rounds = [one_round(running, workload) for _ in range(args.rounds)]
        for cache in (one.cache for one in running):
            found[cache][workload] = {name: median(r[cache][name] for r in rounds) for name in rounds[0][cache]}
            print(cache, workload, found[cache][workload], flush=True)
    for one in engines:
        one.end()
    return found


def one_round(engines: list[Engine], workload: str) -> dict[str, dict[str, float]]:
    """Run a workload in all engines, alternating single steps, so that a disturbance of the machine affects all.

    Returns:
        By cache: "first" and "all_first", the seconds of its own steps until the first of the requests and until all of them
        had a token; and, if they write more, "step", the median of the steps in which each of them writes one.
    """
    wanted = {one.cache: one.ask(workload)["requests"] for one in engines}
    spent = dict.fromkeys(wanted, 0.0)
    arrived: dict[str, dict[str, float]] = {cache: {} for cache in wanted}
    steps: dict[str, list[float]] = {cache: [] for cache in wanted}
    active = list(engines)
    while active:
        for one in list(active):
            answer, mine = one.ask("step"), arrived[one.cache]
            spent[one.cache] += answer["seconds"]
            if len(mine) == wanted[one.cache] == len(answer["wrote"]):
                steps[one.cache].append(answer["seconds"])
            for request in answer["wrote"]:
                mine.setdefault(request, spent[one.cache])
            if not answer["more"]:
                active.remove(one)
    return {
        cache: {"first": min(times.values()), "all_first": max(times.values())}
        | ({"step": median(steps[cache])} if steps[cache] else {})
        for cache, times in arrived.items()
    }


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the divergence from the dense cache, whose scores are in a file that its own run writes."""
    import torch
    from vllm import SamplingParams

    heard: list[torch.Tensor] = []

    def listen(model: Any) -> None:
        compute = model.compute_logits

        def computed(*given: Any, **more: Any) -> Any:
            logits = compute(*given, **more)
            if logits is not None and len(logits) > 1:
                heard.append(logits.float().log_softmax(-1))
            return logits

        model.compute_logits = computed

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = start(args, max_num_batched_tokens=256, max_num_seqs=1, max_model_len=args.tokens + 64)
    prompt = pieces(llm, args.text, 1, args.tokens)[0]
    llm.apply_model(listen)
    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scores = torch.cat(heard)[: args.tokens - 1]
    target = torch.tensor(prompt[1 : len(scores) + 1])
    found = {"tokens": len(scores), "perplexity": float((-scores.gather(1, target[:, None])).mean().exp())}
    found["recall"] = recall(args, llm)
    if args.cache == DENSE:
        torch.save(scores, args.scores)
    else:
        dense = torch.load(args.scores, weights_only=True)
        found["kl"] = float((dense.exp() * (dense - scores)).sum(-1).mean())
        found["top1"] = float((dense.argmax(-1) == scores.argmax(-1)).float().mean())
    return found


def recall(args: argparse.Namespace, llm: Any) -> dict[str, float]:
    """Measure recall: the prompt has random words, and the same words again.

    Returns:
        The share of tokens of the second list that are the engine's first choice, and the mean of their log-probabilities.
    """
    from vllm import SamplingParams

    tokenizer, draw = llm.get_tokenizer(), random.Random(0)
    words = sorted({word for word in args.text.read_text(encoding="utf-8").split() if word.isalpha()})
    scores = []
    for _ in range(args.lists):
        listed = tokenizer.encode(" ".join(draw.sample(words, 300)), add_special_tokens=False)
        prompt = [*listed, *tokenizer.encode("\n", add_special_tokens=False), *listed]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        [read] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        second = range(len(prompt) - len(listed) + 8, len(prompt))  # the first words identify the list
        scores += [read.prompt_logprobs[i][prompt[i]] for i in second]
    return {"right": sum(one.rank == 1 for one in scores) / len(scores), "logprob": mean(one.logprob for one in scores)}


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Time one layer's attention by block table: packed pages and vLLM's dense kernel, interleaved in one process."""
    import torch
    import vllm._C  # noqa: F401
    from vllm import _custom_ops as ops

    from tessera import codecs
    from tessera.codecs.pages import block_layout, write
    from tessera.kernels import paged
    from tessera.kernels.cpu.cpu_paged import attend_paged
    from timing import medians

    dtype, size = torch.bfloat16, args.block_size
    pages = torch.arange(size // 64)
    rows = []
    for heads, kv_heads, dim in SHAPES:
        for requests, length, new in STEPS:
            blocks = -(-length // size)
            codec = codecs.get("hqmq:4")
            layout = block_layout(codec, dim, dtype, pages=len(pages), sink=4, heads=kv_heads)
            pool = torch.zeros(requests * blocks + 1, kv_heads, layout.nbytes, dtype=torch.uint8)
            write(codec, layout, pool, pages * 0, pages, *torch.randn(2, len(pages), kv_heads, 64, dim), pages == 0)
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
            call = paged.PagedCall(q, k, v, pool, ring, layout, step, scale)
            seconds = medians(
                {
                    "packed": lambda call=call, out=out: attend_paged(call, out=out),
                    "dense": lambda given=given: ops.cpu_attention_with_kv_cache(**given),
                },
                repeats=7,
            )
            rows.append({"shape": f"{heads},{kv_heads},{dim}", "requests": requests, "tokens": length, "new": new, **seconds})
    return {"rows": rows}


def instructions() -> list[str]:
    """Return the vector instruction sets of the processor."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("flags")
        )
    except (OSError, StopIteration):
        return []
    return [flag for flag in flags.split() if flag.startswith(("avx", "amx", "fma", "f16c"))]


def command(args: argparse.Namespace, cache: str, what: str, **more: Any) -> list[str]:
    """Return the command of the process for one cache."""
    given = {"--model": args.model, "--text": args.text, "--dtype": args.dtype, "--tokens": args.tokens, "--new": args.new}
    given |= {"--few": args.few, "--requests": args.requests, "--prompt": args.prompt, "--long": args.long}
    given |= {"--lists": args.lists, "--block-size": args.block_size, "--cache": cache, "--what": what, "--stats": args.stats}
    given |= {f"--{name}": value for name, value in more.items()}
    return [sys.executable, __file__, *(str(word) for pair in given.items() for word in pair)]


def environment_of_children() -> dict[str, str]:
    """Set variables so that engines run in the process that makes them, with little output."""
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def complaint(log: str, status: int) -> str:
    """Return the last line of a failed process."""
    lines = [line for line in log.splitlines() if "Error" in line]
    return lines[-1].strip() if lines else f"exit {status}"


def measure_statistics(args: argparse.Namespace, folder: Path) -> Path:
    """Measure key statistics on the last tenth of the text, which nothing else here reads."""
    text, path = args.text.read_text(encoding="utf-8"), folder / "stats.safetensors"
    (folder / "end.txt").write_text(text[-len(text) // 10 :], encoding="utf-8")
    words = {"--model": args.model, "--text": folder / "end.txt", "--out": path}
    made = [sys.executable, "-m", "tessera", "stats", *(str(word) for pair in words.items() for word in pair)]
    subprocess.run(made, check=True, capture_output=True)
    return path


def child(args: argparse.Namespace, cache: str, what: str, scores: Path) -> dict[str, Any]:
    """Run one measurement in a separate process; if it fails, return its error instead."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        asked = command(args, cache, what, scores=scores, json=out.name)
        done = subprocess.run(asked, env=environment_of_children(), capture_output=True, text=True)
        if done.returncode:
            return {"error": complaint(done.stderr, done.returncode)}
        return json.loads(Path(out.name).read_text())


def tokens_held(row: dict[str, Any], length: int) -> float:
    """Return the tokens that the pool holds for requests of one length, counting fractions of requests."""
    blocks = -(-length // row["block_size"]) + row["rings"]
    return (row["blocks"] - 1) / blocks * length


def main() -> None:
    """Measure all caches, or one in a child process."""
    args = parse()
    if args.what == "serve":
        serve(args)
        return
    if args.what:
        args.json.write_text(json.dumps({"quality": quality, "kernels": kernels}[args.what](args)))
        return
    import vllm

    from tessera.evaluation.records import environment
    from tessera.files import atomic_path

    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.pt"
        args.stats = measure_statistics(args, Path(folder))
        rows = []
        for cache in args.caches:
            rows.append({"cache": cache, **child(args, cache, "quality", scores)})
            print(rows[-1], flush=True)
        found = speed(args)
        for row in rows:
            row |= found[row["cache"]]
            if "blocks" in row:
                row["held"] = {str(n): tokens_held(row, n) for n in LENGTHS}
    record = {
        "environment": {
            **environment(),
            "vllm": vllm.__version__,
            "instructions": instructions(),
            "threads": rows[0].get("threads"),
        },
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "requests": args.requests,
        "prompt": args.prompt,
        "long": args.long,
        "few": args.few,
        "new": args.new,
        "block_size": args.block_size,
        "rows": rows,
        "kernels": child(args, DENSE, "kernels", Path())["rows"],
    }
    with atomic_path(args.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
