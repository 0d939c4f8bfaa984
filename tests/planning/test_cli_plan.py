"""`tessera plan` runs end to end, and reports bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import DeepseekV3Config
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.planning.plan_table import caption, cells, header


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_it_prints_the_table_and_names_the_cache(small_model: Path) -> None:
    words = ("plan", small_model, "--context", 400, "--budget", "800KB", "--batch", 2, "--bandwidth", "50GB/s")
    code, out, err = run(*words)
    assert code == 0, err
    found = tessera.plan(str(small_model), context=400, budget="800KB", batch=2, bandwidth="50GB/s")
    assert found.spec is not None
    assert f'tessera.Cache("{found.spec}", model)' in out
    lines = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in out.splitlines()]
    assert [line for line in lines if len(line) == len(header(found))] == [
        list(header(found)),
        *(list(cells(row)) for row in found.rows),
    ]
    assert caption(found, str(small_model)) in out
    assert "400 tokens, 2 rows in float32" in out


def test_candidates_and_dtype_may_be_given(small_model: Path) -> None:
    words = ("plan", small_model, "--context", "2k", "--budget", "1MB", "--dtype", "float16", "--specs", "dense", "window:64")
    code, out, _ = run(*words)
    assert code == 0
    assert "in float16" in out
    assert "made for 512 tokens only" in out
    assert 'tessera.Cache("window:64", model); it forgets all but 64 of the 2,048 tokens' in out


def test_nothing_that_fits_is_exit_code_1(small_model: Path) -> None:
    code, out, _ = run("plan", small_model, "--context", "4k", "--budget", "1KB")
    assert code == 1
    assert "No candidate fits in 1000 B; the smallest" in out


def test_without_a_model_it_plans_for_the_demo_model() -> None:
    code, out, _ = run("plan", "--context", "2k", "--budget", "2MiB")
    assert code == 0
    assert "the demo model: 2,048 tokens" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{small}", "--context", "8q"], "'8q' is no number of tokens; write it like 4096, 128k or 1M"),
        (["{small}", "--budget", "8GiB/s"], "'8GiB/s' is no number of bytes"),
        (["{small}", "--bandwidth", "fast"], "'fast' is no number of bytes a second"),
        (["{small}", "--dtype", "int4"], "no dtype 'int4'"),
        (["{small}", "--specs", "hqmk:4"], "did you mean 'hqmq'"),
        (["{tmp}/empty"], "no config.json"),
        (["{tmp}/nothing"], "there is no model folder"),
        (["{tmp}/mla"], "multi-head latent attention"),
        (["{tmp}/broken"], "cannot load"),
        (["{tmp}/unknown"], "cannot load"),
        (["{tmp}/broken.gguf"], "does not begin with the letters GGUF"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str, small_model: Path, tmp_path: Path) -> None:
    DeepseekV3Config().save_pretrained(tmp_path / "mla")
    for name, text in (("broken", '{"model_type": '), ("unknown", '{"model_type": "abacus"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_text("no model")
    code, _, err = run("plan", *(word.format(tmp=tmp_path, small=small_model) for word in words))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
