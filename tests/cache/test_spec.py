from __future__ import annotations

import cache_fixtures
import pytest

from tessera import codecs
from tessera.cache import Spec, parse
from tessera.codecs import registry


@pytest.mark.parametrize(
    ("text", "spec", "canonical"),
    [
        ("dense", Spec(dense=True), "dense"),
        ("window:512", Spec(window=512), "window:512"),
        ("window:512+sink:4", Spec(sink=4, window=512), "sink:4 + window:512"),
        ("grouped:8", Spec(codec="grouped:8"), "grouped:8"),
        (
            " recent : 128+sink:4 +\tgrouped:8@32768 ",
            Spec(sink=4, recent=128, codec="grouped:8", codec_limit=32768),
            "sink:4 + grouped:8@32768 + recent:128",
        ),
        ("sink:0 + grouped:8 + recent:0", Spec(codec="grouped:8"), "grouped:8"),
    ],
)
def test_parse(text: str, spec: Spec, canonical: str) -> None:
    assert parse(text) == spec
    assert str(spec) == canonical
    assert parse(canonical) == spec
    assert parse(spec) is spec


def test_a_codec_is_named_as_it_names_itself() -> None:
    assert parse("grouped + recent:1").codec == "grouped:8"
    assert parse("hqmq:4.0") == Spec(codec="hqmq:4.0") == Spec(codec="hqmq:4")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("sink:4 + (k=q8_0,v=hqmq:3) + recent:128", "sink:4 + (k=q8_0,v=hqmq:3) + recent:128"),
        ("recent:8+( v = hqmq:3 , k = q8_0 )@4096", "(k=q8_0,v=hqmq:3)@4096 + recent:8"),
        ("hqmq:k4.5v3.5@128 + recent:8", "hqmq:k4.5v3.5@128 + recent:8"),
        ("(k=hqmq:4.5,v=hqmq:3.5)", "hqmq:k4.5v3.5"),
        ("(k=hqmq:4_norot,v=hqmq:3_norot)", "hqmq:k4v3_norot"),
        ("(k=hqmq:4_norot,v=hqmq:3)", "(k=hqmq:4_norot,v=hqmq:3)"),
        ("(k=hqmq:s24_r2,v=grouped:8)", "(k=hqmq:s24_r2,v=grouped:8)"),
        ("hqmq:k4v4 + recent:8", "hqmq:4 + recent:8"),
        ("(k=q8_0,v=q8_0)@64", "q8_0@64"),
    ],
)
def test_keys_and_values_have_codecs_of_their_own(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_codecs_stand_in_the_order_in_which_tokens_pass_through_them() -> None:
    spec = parse("recent:128 + hqmq:4.0@32768 + sink:4 + hqmq:3@131072 + q4_0")
    assert spec == Spec(4, 128, "hqmq:4", 32768, older=(("hqmq:3", 131072), ("q4_0", None)))
    assert spec.codecs == (("hqmq:4", 32768), ("hqmq:3", 131072), ("q4_0", None))
    assert str(spec) == "sink:4 + hqmq:4@32768 + hqmq:3@131072 + q4_0 + recent:128"
    assert parse(str(spec)) == spec
    assert not spec.bounded
    assert parse("hqmq:4@64 + hqmq:3@64").bounded


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snk:4 + grouped:8", ["unknown tier 'snk'", "did you mean 'sink'", "'window:512'", "'grouped:8'"]),
        ("groupd:8", ["unknown tier 'groupd'", "did you mean 'grouped'"]),
        ("zzz", ["unknown tier 'zzz'", "'sink:4'"]),
        ("sink:four + dense", ["'sink:four'", "whole number", "'sink:4'", "'four'"]),
        ("sink + grouped:8", ["'sink'", "whole number"]),
        ("sink:-1 + grouped:8", ["'sink:-1'", "'-1'"]),
        ("recent:1.5 + grouped:8", ["'recent:1.5'"]),
        ("recent:² + grouped:8", ["whole number"]),
        ("grouped:8 + recent:1 + recent:2", ["'recent:2'", "second recent"]),
        ("grouped:8 + grouped:8", ["'grouped:8' keeps every token", "'grouped:8@32768'"]),
        ("grouped:8@64 + q4_0@64 + grouped:8", ["'grouped:8' stands behind itself"]),
        ("hqmq:4@64 + hqmq:3@63", ["'hqmq:3@63' is less than one block", "'hqmq:3@64'"]),
        ("dense + grouped:8", ["'dense'", "'grouped:8'", "contradict"]),
        ("dense + sink:4", ["'dense'", "'sink'"]),
        ("dense + window:4", ["'dense'", "'window'"]),
        ("dense:3", ["'dense'", "no argument"]),
        ("window:512 + recent:4", ["'window'", "'recent'"]),
        ("window:512 + grouped:8", ["'window'", "'grouped:8'"]),
        ("window:0", ["at least 1"]),
        ("sink:4 + recent:128", ["window:128", "dense", "codec"]),
        ("sink:4", ["window:512"]),
        ("", ["empty tier"]),
        ("sink:4 +", ["empty tier"]),
        ("grouped:8@", ["'grouped:8@'", "whole number", "grouped:8@32768"]),
        ("grouped:8@63", ["grouped:8@64"]),
        ("sink:4 + hqmq:4 + tc", ["'tc'", "window:512"]),
        ("window:512 + tc:3", ["'tc' takes no argument", "'tc:3'"]),
        ("(k=q8_0,v=hqmk:3)", ["unknown codec 'hqmk'", "did you mean 'hqmq'", "(k=q8_0,v=hqmk:3)"]),
        ("(k=q8_0,v=sink:4)", ["unknown codec 'sink'", "hqmq:4"]),
        ("(k=q8_0)", ["no codec for values", "'v='", "(k=q8_0,v=hqmq:3)"]),
        ("(v=q8_0)", ["no codec for keys", "'k='"]),
        ("(k=q8_0,v=int:4,v=q8_0)", ["'v=q8_0' is a second codec for values"]),
        ("(q8_0,v=int:4)", ["'k='", "'v='", "'q8_0'"]),
        ("(k=q8_0,v=hqmq:3", ["between brackets", "(k=q8_0,v=hqmq:3)"]),
        ("(k=q8_0,v=hqmq:3)64", ["between brackets", "'(k=q8_0,v=hqmq:3)64'"]),
        ("(k=q8_0,v=hqmq:3)@63", ["'(k=q8_0,v=hqmq:3)@64'"]),
        ("(k=q8_0,v=hqmq:3)@", ["whole number", "'(k=q8_0,v=hqmq:3)@32768'"]),
        ("(k=q8_0@64,v=hqmq:3)", ["keys and values together", "'(k=q8_0,v=hqmq:3)@32768'"]),
        ("(k=hqmq:k4v3,v=q8_0)", ["hqmq:k4v3 is two codecs", "keys need one"]),
        ("hqmq:k4v3 + (k=q8_0,v=hqmq:3)", ["'hqmq:k4v3' keeps every token", "'hqmq:k4v3@32768'"]),
        ("hqmq:k4", ["'k4'", "k4.5v3.5"]),
        ("hqmq:k9v3", ["hqmq takes 2, 2.5, 3", "got 9", "hqmq:k9v3"]),
        ("dense + (k=q8_0,v=hqmq:3)", ["'dense'", "'(k=q8_0,v=hqmq:3)'", "contradict"]),
    ],
)
def test_mistakes_are_named(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse(text)
    for word in words:
        assert word in str(error.value)


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="a spec is a string"):
        parse(4)  # type: ignore[arg-type]


def test_group_must_divide_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(cache_fixtures.Grouped):
        group = 48

    monkeypatch.setitem(registry._FACTORIES, "odd", (lambda _: Odd(), ("odd",)))
    with pytest.raises(ValueError, match="encodes 48 tokens together"):
        parse("odd + recent:4")


def test_every_codec_is_a_tier() -> None:
    for example in codecs.examples():
        assert parse(f"{example} + recent:8").codec == example
