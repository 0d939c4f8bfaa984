"""A tensor-parallel model in two processes generates the same as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tessera.cache import Cache
from tessera.cache.ranks import Ranks, heads_here, ranks_of
from tessera.cache.report import CacheReport
from tessera.codecs import KeyStats, save_stats

pytest.importorskip("transformers.distributed", reason="this transformers spreads models in another way")

PROCESS = Path(__file__).with_name("tensor_parallel_process.py")
LEAVE = Path(__file__).parents[1] / "run_and_leave.py"
SIZE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "eos_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.2}


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of one process and of two: "whole", "rank0", "rank1"."""
    torch.manual_seed(0)
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    made = (
        LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS))
        if request.param == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**SIZE, **HEADS))
    )
    made.save_pretrained(folder)
    save_stats([KeyStats(torch.randint(80, 200, (1, 2, 32), dtype=torch.uint8)) for _ in range(2)], out / "stats.safetensors")
    run(sys.executable, str(PROCESS), str(folder), str(out))
    spread = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(sys.executable, *spread, str(LEAVE), str(PROCESS), str(folder), str(out))
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("whole", "rank0", "rank1")}


def test_two_processes_generate_what_one_does(outcome: dict[str, Any]) -> None:
    assert outcome["rank0"]["tokens"] == outcome["whole"]["tokens"]
    assert outcome["rank1"]["tokens"] == outcome["whole"]["tokens"]


def test_each_process_holds_its_own_heads(outcome: dict[str, Any]) -> None:
    assert (outcome["whole"]["heads"], outcome["rank0"]["heads"], outcome["rank1"]["heads"]) == (2, 1, 1)
    for spec, whole in outcome["whole"]["own"].items():
        own = outcome["rank0"]["own"][spec]
        assert (own["ranks"], own["summed"]) == (2, False)
        assert 2 * own["nbytes"] == whole["nbytes"], spec
        assert 2 * own["elements"] == whole["elements"]
        assert own["bits_per_element"] == pytest.approx(whole["bits_per_element"])
    assert outcome["rank0"]["said"].splitlines()[0].endswith(", in one of 2 processes")


def test_reports_are_summed_on_request(outcome: dict[str, Any]) -> None:
    for spec, whole in outcome["whole"]["own"].items():
        for rank in ("rank0", "rank1"):
            total = outcome[rank]["all"][spec]
            assert (total.pop("ranks"), total.pop("summed")) == (2, True)
            assert total == {name: pytest.approx(value) for name, value in whole.items() if name in total}
    # One process has nothing to sum.
    assert outcome["whole"]["all"] == outcome["whole"]["own"]


def test_what_would_be_wrong_is_refused(outcome: dict[str, Any]) -> None:
    assert "the heads of process 1 of 2, and they are wanted for process 0 of 2" in outcome["rank0"]["other"]
    assert "of a tensor-parallel one from the model itself" in outcome["rank0"]["config"]
    assert "tensor-parallel" in outcome["rank0"]["memory"]


class Spread(torch.nn.Module):
    """A stand-in with the attributes that describe tensor parallelism."""

    def __init__(self, style: str | None) -> None:
        super().__init__()
        self.attention = torch.nn.Module()
        self.attention.layer_idx = 0
        self.attention.k_proj = torch.nn.Linear(2, 2)
        self.tp_plan = {} if style is None else {"attention.k_proj": style}


def test_heads_that_cannot_be_spread_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="3 key heads of layer 0 cannot be spread evenly over 2 processes"):
        heads_here(Spread("colwise"), [((3, 64), None)], Ranks(0, 2))


def test_heads_that_every_process_has_stay_whole() -> None:
    for style in (None, "colwise_gather_output"):
        assert heads_here(Spread(style), [((3, 64), None)], Ranks(0, 2)) == [((3, 64), None)]
    assert heads_here(Spread("colwise"), [((4, 64), 128)], Ranks(1, 2)) == [((2, 64), 128)]


def test_a_model_in_one_process_is_whole() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS))
    assert ranks_of(model) is None
    assert Cache("dense", model).report(all_ranks=True).ranks == 1


def test_tiers_of_different_processes_are_weighed_by_what_they_hold() -> None:
    one = CacheReport(
        "hqmq:4", 100, {"hqmq:4": 80, "recent": 20}, {"hqmq:4": 4.0, "recent": 32.0}, 165, 800 / 165, 9, 400, 4.0, ranks=2
    )
    total = CacheReport.total([one, one])
    assert (total.nbytes, total.elements, total.dense_nbytes, total.tiers) == (200, 330, 800, {"hqmq:4": 160, "recent": 40})
    assert total.tier_bits == pytest.approx(one.tier_bits)
    assert total.bits_per_element == pytest.approx(one.bits_per_element)
    assert str(total).splitlines()[0].endswith(", in all 2 processes")
