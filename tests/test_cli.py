"""Each command runs end to end, and reports bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import tessera
from tessera.adapters import attached_memory
from tessera.cli import app
from tessera.codecs import load_stats
from tessera.evaluation import Comparison, load, load_all
from tessera.kernels import cpu
from tessera.models import demo_memory_path, heldout_text
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_compare_prints_a_table_and_saves_it(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    specs = ("sink:4 + hqmq:4 + recent:32", "q4_0")
    code, out, _ = run(
        "compare",
        "--model",
        small_model,
        "--text",
        small_text,
        "--specs",
        *specs,
        "--context",
        256,
        "--windows",
        2,
        "--out",
        tmp_path,
    )
    assert code == 0
    saved = Comparison.load(tmp_path / "compare.json")
    assert [(r.protocol, r.spec) for r in saved.rows] == [
        ("streaming", "dense"),
        ("streaming", "sink:4 + hqmq:4 + recent:32"),
        ("streaming", "q4_0"),
        ("paper", "dense"),
        ("paper", "sink:4 + hqmq:4"),
        ("paper", "q4_0"),
    ]
    for row in saved.rows:
        assert row.spec in out
        assert f"{row.perplexity:.3f}" in out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "On your own model" in out or "No cache here" in out


def test_compare_measures_every_combination_of_tiers(tmp_path: Path) -> None:
    """With limits so small that tokens pass from tier to tier."""
    layers = "{0-1,-1: sink:4 + hqmq:5 + recent:32; *: sink:4 + hqmq:3 + recent:32}"
    specs = [
        "sink:4 + hqmq:4@64 + hqmq:3@64 + recent:32",
        "sink:4 + hqmq:3@64 + recent:32 + tc",
        "sink:4 + hqmq:4@64 + hqmq:3@64 + recent:32 + tc",
        "window:64",
        "sink:4 + window:256 + tc",
        layers,
        "hqmq:k5v3",
        "(k=q8_0,v=hqmq:3)",
        "sink:4 + hqmq:4 + recent:32",
        "sink:4 + hqmq:4/top:64 + recent:32",
    ]
    code, _, err = run(
        "compare", "--specs", *specs, "--protocol", "streaming", "--context", 320, "--windows", 1, "--out", tmp_path
    )
    assert code == 0, err
    found = {row.spec: row for row in Comparison.load(tmp_path / "compare.json").rows}
    assert list(found) == ["dense", *specs]
    assert all(0 < found[spec].kl < 0.5 for spec in specs)
    chain, tc, both, window, _, _, _, _, whole, sparse = (found[spec] for spec in specs)
    assert chain.nbytes < both.nbytes
    assert tc.nbytes < both.nbytes
    assert chain.nbytes < whole.nbytes == sparse.nbytes
    assert window.nbytes < found["dense"].nbytes / 3
    assert sparse.kl > whole.kl > 0


def test_compare_measures_caches_beside_a_tensor_memory(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    model = tessera.attach(load(str(small_model)).model, TensorMemoryConfig(channels=4, grid=(3, 3), chunk=16))
    with torch.no_grad():
        attached_memory(model).shared.out_proj.weight.normal_(0, 0.05)
    tessera.save_memory(model, tmp_path / "memory.safetensors")
    specs = ["sink:4 + hqmq:4@64 + hqmq:3@64 + recent:32", "{0: (k=q8_0,v=hqmq:3); *: sink:4 + hqmq:k4v3/top:64 + recent:32}"]
    given = ["--model", small_model, "--text", small_text, "--memory", tmp_path / "memory.safetensors"]
    code, _, err = run("compare", *given, "--specs", *specs, "window:64", "--context", 256, "--windows", 1, "--out", tmp_path)
    assert code == 0, err
    rows = [row for row in Comparison.load(tmp_path / "compare.json").rows if row.protocol == "streaming"]
    assert [row.spec for row in rows] == ["dense", *specs, "window:64"]
    assert all(0 < row.kl < 0.5 for row in rows[1:])


def test_compare_reads_several_models_and_skips_tokens(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    source = load(str(small_model))
    with torch.no_grad():
        source.model.lm_head.weight.mul_(2)
    source.model.save_pretrained(other)
    source.tokenizer.save_pretrained(other)
    words = ("compare", "--text", small_text, "--specs", "q4_0", "--protocol", "paper", "--context", 64, "--windows", 1)
    code, out, err = run(*words, "--skip", 100, "--model", small_model, "--model", other, "--out", tmp_path)
    assert code == 0, err
    first, second = load_all(tmp_path / "compare.json")
    assert (first.model, second.model, first.skip) == (small_model.name, "other", 100)
    assert first.rows[0].perplexity != second.rows[0].perplexity
    assert out.count("paper: every key") == 2
    assert f"{first.model}, paper" in out
    assert "other, paper" in out
    assert all(f"{r.perplexity:.3f}" in out for r in (*first.rows, *second.rows))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    code, _, _ = run(*words, "--skip", 100, "--model", other, "--out", tmp_path)
    assert code == 0
    alone = Comparison.load(tmp_path / "compare.json")
    assert [r.kl for r in alone.rows] == [r.kl for r in second.rows]


def test_an_option_of_several_values_may_be_repeated_or_given_them_at_once(small_model: Path, tmp_path: Path) -> None:
    texts = []
    for letter in "ab":
        texts.append(tmp_path / f"{letter}.txt")
        texts[-1].write_text(f"{letter} " * 200)
    words = ("compare", "--model", small_model, "--context", 16, "--windows", 1, "--out", tmp_path)
    assert run(*words, "--specs", "q4_0", "dense", "--text", *texts, "--protocol", "paper")[0] == 0
    at_once = Comparison.load(tmp_path / "compare.json")
    assert (
        run(*words, "--spec", "q4_0", "--text", texts[0], "--protocol", "paper", "--spec", "dense", "--text", texts[1])[0] == 0
    )
    repeated = Comparison.load(tmp_path / "compare.json")
    assert [r.spec for r in at_once.rows] == [r.spec for r in repeated.rows] == ["dense", "q4_0"]
    assert at_once.text == repeated.text
    assert "a.txt" in at_once.text
    assert "b.txt" in at_once.text
    code, _, err = run(*words, "q4_0")
    assert code == 2
    assert "q4_0" in err


def test_compare_without_arguments_uses_the_demo_model_and_held_out_text(tmp_path: Path) -> None:
    code, _, _ = run("compare", "--specs", "hqmq:3", "--protocol", "paper", "--context", 256, "--windows", 1, "--out", tmp_path)
    assert code == 0
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["model"] == "the demo model"
    assert "held out" in saved["text"]
    exact, packed = saved["rows"]
    assert 1 < exact["perplexity"] < 30
    assert 0 < packed["kl"] < 0.2


def test_generate_streams_what_the_model_says(small_model: Path) -> None:
    source = load(str(small_model))
    inputs = source.tokenizer("the square of 7", return_tensors="pt")
    with torch.no_grad():
        ids = source.model.generate(**inputs, max_new_tokens=100, do_sample=False)
    expected = source.tokenizer.decode(ids[0], skip_special_tokens=True)
    code, out, err = run(
        "generate", "--model", small_model, "--prompt", "the square of 7", "--cache", "dense", "--max-new-tokens", 100
    )
    assert code == 0
    assert out == expected + "\n"
    assert "79 tokens: cache" in err  # 16 of the prompt and 63 new ones; the 64th has not been read yet
    assert "dense: 115 tokens" in err


def test_stats_are_measured_saved_and_used(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    words = ("--model", small_model, "--text", small_text)
    code, out, _ = run("stats", *words, "--tokens", 200, "--out", path)
    assert code == 0
    source = load(str(small_model))
    stats = load_stats(path)
    assert f"Saved {path}, {sum(one.nbytes for one in stats):,} bytes" in out
    # The command measures the same as a cache on the same tokens, except for the sinks and the number of tokens.
    ids = source.tokenizer(small_text.read_text(), return_tensors="pt")["input_ids"][:, :200]
    cache = tessera.Cache("sink:4 + hqmq:4", source.model)
    with torch.no_grad():
        source.model(ids, past_key_values=cache)
    for layer, found in zip(cache.layers, stats, strict=True):
        learned = layer.groups[0].chain.stats
        assert ((learned.widths / found.widths).log2().abs() <= 1).float().mean() > 0.9
    spec = ("--cache", "hqmq:4", "--stats", path, "--prompt", small_text.read_text()[:300], "--max-new-tokens", 4)
    code, out, err = run("generate", "--model", small_model, *spec)
    assert code == 0
    assert "hqmq:4" in err
    code, out, _ = run(
        *("compare", *words, "--context", 256, "--windows", 1, "--protocol", "paper", "--specs", "hqmq:4", "q4_0"),
        *("--stats", path, "--out", tmp_path),
    )
    assert code == 0
    code, _, err = run("generate", "--model", small_model, "--cache", "q4_0", "--stats", path, "--prompt", "x")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "'q4_0' has no use for them" in err
    code, _, err = run("stats", "--model", small_model, "--text", small_text, "--tokens", 64, "--out", small_text / "x")
    assert code == 2


def test_generate_samples_the_same_from_the_same_seed(small_model: Path) -> None:
    words = ("generate", "--model", small_model, "--prompt", "x", "--temperature", 1.0, "--max-new-tokens", 30)
    first, again, other = (run(*words, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_generate_uses_a_memory(small_model: Path, tmp_path: Path) -> None:
    source = load(str(small_model))
    tessera.attach(source.model, TensorCacheConfig(window=8, sink=2))
    with torch.no_grad():
        for name, p in source.model.named_parameters():
            if "tensor_cache.out" in name:
                p.normal_(0, 0.3)
    tessera.save_memory(source.model, tmp_path / "memory.safetensors")
    spec, prompt = "sink:2 + window:8 + tc", "the square of 12 is larger than that"
    words = ("generate", "--model", small_model, "--prompt", prompt, "--max-new-tokens", 40)
    code, out, err = run(*words, "--cache", spec, "--memory", tmp_path / "memory.safetensors")
    assert code == 0
    inputs = source.tokenizer(prompt, return_tensors="pt")
    ids = source.model.generate(**inputs, past_key_values=tessera.Cache(spec, source.model), max_new_tokens=40, do_sample=False)
    assert out == source.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert err.splitlines()[-1].split()[0] == "tc"
    assert out != run(*words, "--cache", "sink:2 + window:8")[1]


def test_generate_takes_the_demo_models_own_memory() -> None:
    text = heldout_text(3_000)
    source = load(memory=demo_memory_path())
    spec = "sink:4 + window:256 + tc"
    inputs = source.tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 600
    ids = source.model.generate(**inputs, past_key_values=tessera.Cache(spec, source.model), max_new_tokens=20, do_sample=False)
    code, out, err = run("generate", "--prompt", text, "--cache", spec, "--max-new-tokens", 20)
    assert code == 0
    assert out == source.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert err.splitlines()[-1].split()[0] == "tc"


def test_generate_reads_a_prompt_file_and_packs_it(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(small_text.read_text()[:400])
    code, out, err = run(
        "generate", "--model", small_model, "--prompt-file", prompt, "--cache", "hqmq:4 + recent:16", "--max-new-tokens", 5
    )
    assert code == 0
    assert out.startswith(prompt.read_text())
    assert "hqmq:4" in err.splitlines()[-2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--text", "{tmp}/nothing.txt"], "there is no text file"),
        (["compare", "--text", "{tmp}/empty.txt"], "is empty"),
        (["compare", "--model", "{tmp}"], "no config.json"),
        (["compare", "--model", "{tmp}/nothing"], "there is no model folder"),
        (["compare", "--model", "{small}", "--context", "5000"], "5000 tokens is longer than the 512"),
        (["compare", "--model", "{small}", "{small}/", "--memory", "x"], "--memory was made for one model, and 2 are given"),
        (["compare", "--skip", "-1", "--model", "{small}"], "skip must be at least 0"),
        (["compare", "--specs", "hqmk:4"], "did you mean 'hqmq'"),
        (["compare", "--protocol", "offline"], "streaming and paper"),
        (["compare", "--device", "abacus"], "'abacus' cannot be used"),
        (["compare", "--out", "{tmp}/empty.txt", "--specs", "dense", "--context", "8", "--windows", "1"], "empty.txt"),
        (["generate"], "give --prompt"),
        (["generate", "--prompt", "x", "--memory", "{tmp}/nothing", "--cache", "window:8 + tc"], "there is no memory"),
        (["generate", "--prompt", "x", "--memory", "{tmp}/empty.txt", "--cache", "window:8"], "has no 'tc'"),
        (["generate", "--prompt", "x", "--memory", "{tmp}/empty.txt", "--cache", "window:8 + tc"], "holds no memory that"),
        (["generate", "--model", "{small}", "--prompt", "x", "--cache", "window:8 + tc"], "needs a Tensor Cache attached"),
        (["generate", "--prompt", "x", "--cache", "sink:4 + window:8 + tc"], "was made for 'sink:4 + window:256 + tc'"),
        (["generate", "--prompt", " "], "prompt is empty"),
        (["generate", "--prompt", "x", "--cache", "sink:4"], "window:512"),
        (["generate", "--model", "{small}", "--prompt", "x", "--max-new-tokens", "600"], "512"),
        (["generate", "--prompt", "x", "--prompt-file", "y"], "give --prompt or --prompt-file"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    code, _, err = run(*(word.format(tmp=tmp_path, small=small_model) for word in words))
    assert code == 2
    assert message in err
    if "Usage" not in err:
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def commands(group: typer.core.TyperGroup, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(None):  # type: ignore[arg-type]
        command = group.commands[name]
        inner = getattr(command, "commands", None)
        found += commands(command, (*words, name)) if inner else [(*words, name)]  # type: ignore[arg-type]
    return found


def test_every_command_shows_an_example() -> None:
    names = commands(typer.main.get_command(app))  # type: ignore[arg-type]
    assert names == [
        ("compare",),
        ("generate",),
        ("info",),
        ("lm-eval",),
        ("plan",),
        ("prefill",),
        ("stats",),
        ("view",),
        ("eval", "recall"),
        ("eval", "diagnostics"),
        ("eval", "capacity"),
        ("eval", "language"),
        ("eval", "streams"),
        ("eval", "needle"),
        ("eval", "ruler"),
        ("train", "lm"),
        ("train", "recall"),
        ("train", "image"),
        ("train", "video"),
        ("train", "demo"),
        ("train", "memory"),
    ]
    for words in names:
        code, out, _ = run(*words, "--help")
        assert code == 0
        assert "Example" in out
        assert f"tessera {' '.join(words)}" in out


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["train", "recall", "--steps", "1", "--out", "{tmp}/run"], "accelerate"),
        (["eval", "recall", "--out", "{tmp}/eval"], "accelerate"),
        (["train", "image", "--steps", "1", "--out", "{tmp}/run"], "accelerate"),
        (["view", "--task", "binding", "--steps", "1", "--out", "{tmp}/view"], "matplotlib"),
    ],
)
def test_a_command_of_the_lab_says_which_extra_it_misses(words: list[str], package: str, tmp_path: Path) -> None:
    """The test runs in a separate process that cannot import either package."""
    script = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "import tessera.cli; sys.argv[:] = ['tessera', *sys.argv[2:]]; tessera.cli.main()"
    )
    given = [word.format(tmp=tmp_path) for word in words]
    done = subprocess.run([sys.executable, "-c", script, package, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: `tessera {words[0]}` needs the package {package}: pip install 'tessera[lab]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_broken_command_of_another_package_leaves_the_others_usable(tmp_path: Path) -> None:
    about = tmp_path / "elsewhere-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[tessera.commands]\nbroken = elsewhere.nowhere:app\nleaves = leaves:app\n")
    script = "import sys; sys.path.append(sys.argv.pop(1)); import tessera.cli; tessera.cli.main()"
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    warning = "warning: `tessera broken` of elsewhere is left out: ModuleNotFoundError: No module named 'elsewhere'\n"
    for words, code, says, warnings in (
        (["--help"], 0, "compare", 2),
        (["view", "--help"], 0, "Example", 0),
        (["broken"], 2, "", 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, says in done.stdout) == (code, True), done.stderr
        assert done.stderr.count("warning: ") == warnings
        assert done.stderr.count(warning) == min(1, warnings)


def test_commands_of_the_core_do_not_import_the_lab(tmp_path: Path) -> None:
    script = (
        "import sys; from tessera.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(any(name.startswith('tessera.lab') for name in sys.modules))"
    )
    shared = ["--context", "64", "--windows", "1", "--specs", "hqmq:4", "--protocol", "paper", "--out", str(tmp_path)]
    for words in (["info"], ["compare", *shared], ["generate", "--prompt", "def f(", "--max-new-tokens", "2"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_info_says_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("info")
    assert code == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") == 4}
    assert rows["reference"] == "yes"
    for level in cpu.LEVELS:
        assert rows[f"cpu:{level}"] == ("yes" if level in cpu.levels() else "no")
    assert f"In use: auto - {f'cpu:{cpu.levels()[-1]}' if cpu.levels() else 'reference'}" in out
    said = " ".join(out.split())
    listed = re.search(r"on a GPU for all but (.*?), whose vectors are decoded in PyTorch there\.", said)
    assert listed is not None
    unread = set(listed[1].split(", "))  # and codecs registered by other tests
    assert {"hqmq:o170_r4", "hqmq:s96_r4", "hqmq:s96_r4_med3"} <= unread
    assert not unread & {"hqmq:4", "hqmq:3", "scalar:4", "q4_0", "q8_0", "int:4", "kivi:4", "fp8"}
    monkeypatch.setenv("TESSERA_BACKEND", "abacus")
    code, _, error = run("info")
    assert code == 2
    assert "no backend 'abacus'" in error


def test_version() -> None:
    assert run("--version")[1] == f"tessera {tessera.__version__}\n"
