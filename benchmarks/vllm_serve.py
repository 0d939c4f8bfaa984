"""Record a transcript of vLLM's server with packed pages: its log, its clients' output, and its metrics afterwards.

It starts the server as a user would, runs `docs/vllm_client.py`, which asks about a text through the `openai` package, reads
`/metrics`, and does the same with a server that has no specification. `benchmarks/tables.py` puts it into `docs/vllm.md`.

Run it in an environment with vLLM (`make test-vllm` creates .venv-vllm).

Example:

    .venv-vllm/bin/python benchmarks/vllm_serve.py --model path/to/SmolLM2-135M-Instruct --text book.txt
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
#: Pattern of the lines of vLLM's log that give the pool's capacity.
SAID = ("KV cache size", "Tessera")
#: The metrics that the documentation shows.
METRICS = ("prompt_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total")
OPTIONS = (
    *("--max-model-len", "8192", "--block-size", "256", "--kv-cache-memory-bytes", "1G"),
    *("--enable-prompt-tokens-details", "--enforce-eager"),
)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--text", required=True, type=Path, help="a text; the questions are about 12,000 characters of it")
    parser.add_argument("--spec", default="sink:4 + hqmq:4")
    parser.add_argument("--seconds", type=float, default=600, help="seconds within which the server must start")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "vllm_serve.json")
    return parser.parse_args()


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def transcript(args: argparse.Namespace, article: Path, spec: str | None) -> dict[str, Any]:
    """Return one server's log, its clients' output and its metrics."""
    port = free_port()
    name = Path(args.model).name
    shown = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", name, *OPTIONS]
    command = [sys.executable, *shown[1:4], args.model, "--served-model-name", name, *OPTIONS, "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if name != "TESSERA_SPEC"}
    if spec is not None:
        env["TESSERA_SPEC"] = spec
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            wait(f"http://localhost:{port}/health", server, args.seconds)
            asked = [sys.executable, str(ROOT / "docs" / "vllm_client.py"), f"http://localhost:{port}/v1", str(article)]
            lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
            with urlopen(f"http://localhost:{port}/metrics") as found:
                metrics = found.read().decode()
        except Exception as error:
            log.seek(0)
            raise RuntimeError(f"the server did not answer; the end of its log:\n{log.read()[-4000:]}") from error
        finally:
            server.terminate()
            server.wait()
        log.seek(0)
        heard = [line.partition("] ")[2].strip() for line in log if any(word in line for word in SAID)]
    spelled = "" if spec is None else f"TESSERA_SPEC={shlex.quote(spec)} "
    return {
        "command": spelled + shlex.join(shown),
        "log": heard,
        "client": lines,
        "metrics": [
            f"vllm:{name} {sum(map(float, re.findall(rf'^vllm:{name}{{.*}} (.*)$', metrics, re.MULTILINE))):,.0f}"
            for name in METRICS
        ],
    }


def wait(url: str, server: subprocess.Popen[str], seconds: float) -> None:
    """Wait until a server answers.

    Raises:
        TimeoutError: if it does not answer in this many seconds.
        ChildProcessError: if the server has ended.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            raise ChildProcessError(f"the server ended with {server.returncode}")
        try:
            urlopen(url).close()
        except (URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"{url} did not answer in {seconds} s")


def main() -> None:
    """Serve with packed pages and without, and write both transcripts."""
    args = parse()
    import vllm

    from tessera.evaluation.records import environment
    from tessera.files import atomic_path

    with tempfile.TemporaryDirectory() as folder:
        article = Path(folder) / "article.txt"
        article.write_text(args.text.read_text(encoding="utf-8")[2000:14000], encoding="utf-8")
        record = {
            "environment": {**environment(), "vllm": vllm.__version__},
            "packed": transcript(args, article, args.spec),
            "dense": transcript(args, article, None),
        }
    with atomic_path(args.json) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for part in ("packed", "dense"):
        print(json.dumps(record[part], indent=1))


if __name__ == "__main__":
    main()
