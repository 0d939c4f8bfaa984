"""In lm-evaluation-harness the model type `tessera` gives the scores of `hf` for "dense", and reads other caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.models import demo_memory_path, demo_path, heldout_text

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which is large; run with: make test-lm-eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tessera.integrations.lm_eval import TesseraLM

COARSE = "sink:4 + int:2 + recent:16"
TASKS = ["tessera_choices", "tessera_completions", "tessera_texts"]
OPTIONS: dict[str, Any] = {"pretrained": str(demo_path()), "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tasks of this folder, with the path of their data filled in."""
    here, there = Path(__file__).parent / "lm_eval_tasks", tmp_path_factory.mktemp("tasks")
    for path in here.glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace("FOLDER", str(here)).replace("CACHE", str(there / "cache"))
        (there / path.name).write_text(text, encoding="utf-8")
    return there


@pytest.fixture(scope="module")
def hf() -> Any:
    return HFLM(batch_size=3, **OPTIONS)


def model(cache: str, batch_size: int = 3, **more: Any) -> TesseraLM:
    return TesseraLM(cache=cache, batch_size=batch_size, **OPTIONS, **more)


def scored(lengths: list[tuple[int, int]]) -> list[Any]:
    """Make requests with about this many characters of context and continuation, from held-out code."""
    text, found, at = heldout_text(60_000), [], 0
    for context, continuation in lengths:
        cut = text.index("\n", at + context) if context else at
        found.append(Instance("loglikelihood", {}, (text[at:cut], text[cut : cut + continuation]), len(found)))
        at = cut + continuation if len(found) != 3 else at  # the fourth has the same context as the third
    return found


def rolling(lengths: list[int]) -> list[Any]:
    text = heldout_text(60_000)
    return [Instance("loglikelihood_rolling", {}, (text[9000 * i :][:n],), i) for i, n in enumerate(lengths)]


def prompts(lengths: list[int], **options: Any) -> list[Any]:
    text = heldout_text(60_000)
    options = {"until": ["\n\n"], "max_gen_toks": 24, **options}
    return [Instance("generate_until", {}, (text[3000 * i :][:n], options), i) for i, n in enumerate(lengths)]


LENGTHS = [(300, 2), (300, 60), (2000, 30), (2000, 90), (10, 5), (700, 400), (0, 80), (1500, 3)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_dense_gives_the_log_likelihoods_of_hf(hf: Any, batch_size: int) -> None:
    requests = scored(LENGTHS)
    wanted, got = hf.loglikelihood(requests), model("dense", batch_size).loglikelihood(requests)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    torch.testing.assert_close([x for x, _ in got], [x for x, _ in wanted], rtol=1e-5, atol=1e-4)


def test_dense_gives_the_perplexity_of_hf(hf: Any) -> None:
    requests = rolling([3000, 40, 1200])
    torch.testing.assert_close(
        model("dense").loglikelihood_rolling(requests), hf.loglikelihood_rolling(requests), rtol=1e-5, atol=1e-3
    )


def test_dense_generates_what_hf_generates(hf: Any) -> None:
    for more in ({}, {"num_beams": 3}):
        requests = prompts([50, 1200, 600, 1300, 20], **more)
        assert model("dense").generate_until(requests) == hf.generate_until(requests)


def test_what_is_read_comes_from_the_cache(hf: Any) -> None:
    """A very coarse cache must change the result of every kind of request, and one that never quantises must not."""
    requests, texts, asked = scored([(2000, 30), (1500, 60)]), rolling([3000, 1200]), prompts([1200, 1300])
    coarse = model(COARSE)
    exact, got = (torch.tensor([x for x, _ in each.loglikelihood(requests)]) for each in (hf, coarse))
    assert (exact - got).abs().min() > 0.01
    exact, got = (torch.tensor(each.loglikelihood_rolling(texts)) for each in (hf, coarse))
    assert (exact - got).min() > 1
    assert coarse.generate_until(asked) != hf.generate_until(asked)
    assert coarse.report is not None
    assert coarse.report.tier_bits["int:2"] < 4
    wide = model("sink:4 + int:2 + recent:2048")
    torch.testing.assert_close(
        [x for x, _ in wide.loglikelihood(requests)], [x for x, _ in hf.loglikelihood(requests)], rtol=1e-5, atol=1e-4
    )


def test_scores_do_not_depend_on_the_batch() -> None:
    requests, asked = scored(LENGTHS), prompts([50, 1200, 600, 1300, 20])
    alone, together = model(COARSE, 1), model(COARSE, 4)
    torch.testing.assert_close(
        [x for x, _ in together.loglikelihood(requests)], [x for x, _ in alone.loglikelihood(requests)], rtol=1e-4, atol=1e-3
    )
    assert together.generate_until(asked) == alone.generate_until(asked)


def test_long_calls_see_less_of_the_cache() -> None:
    """In one call all but the scored tokens is read exactly; a text that is scored in full never reads the cache."""
    requests = rolling([1200])
    many, one = (model(COARSE, chunk=chunk).loglikelihood_rolling(requests)[0] for chunk in (32, 2048))
    assert one > many + 1
    torch.testing.assert_close(one, model("dense").loglikelihood_rolling(requests)[0], rtol=1e-5, atol=1e-3)


def test_what_is_longer_than_the_model_loses_its_beginning_as_with_hf(hf: Any) -> None:
    requests = scored([(9000, 40)])
    torch.testing.assert_close(
        model("dense").loglikelihood(requests)[0][0], hf.loglikelihood(requests)[0][0], rtol=1e-5, atol=1e-4
    )


def test_a_tensor_cache_is_read_along() -> None:
    spec, requests = "sink:4 + window:256 + tc", scored([(4000, 60)])
    got = model(spec, memory=str(demo_memory_path())).loglikelihood(requests)[0][0]
    assert got != pytest.approx(model("sink:4 + window:256").loglikelihood(requests)[0][0], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "hqmq:4 + recnet:8"}, "recent"),
        ({"cache": "dense", "chunk": 0}, "chunk must be a whole number"),
        ({"cache": "sink:4 + window:256 + tc"}, "memory="),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TesseraLM(pretrained="no/such/model", **options)


def test_the_harness_runs_its_tasks_with_it(tasks: Path, hf: Any) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for name, given in (("hf", hf), ("dense", model("dense"))):
        results = simple_evaluate(model=given, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
        found[name] = {task: results["results"][task] for task in TASKS}
    assert found["hf"]["tessera_choices"]["acc,none"] >= 0.8
    assert found["hf"]["tessera_completions"]["exact_match,none"] > 0
    for task in TASKS:
        for metric, value in found["hf"][task].items():
            assert found["dense"][task][metric] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), metric


def test_the_command_runs_the_harness(tasks: Path, tmp_path: Path) -> None:
    given = f"pretrained={demo_path()},dtype=float32,cache={COARSE},chunk=32"
    command = [
        *(sys.executable, "-m", "tessera", "lm-eval", "--model", "tessera", "--model_args", given, "--device", "cpu"),
        *("--tasks", "tessera_choices,tessera_completions", "--include_path", str(tasks), "--batch_size", "4"),
        *("--output_path", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tessera_choices" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["config"]["cache"] == COARSE
    assert saved["config"]["cache_chunk"] == 32
    assert saved["config"]["cache_compression"] > 0
