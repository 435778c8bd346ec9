"""Prompt syntax: the parses that its programs publish, the rules that they apply, and that no text is too much."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.prompts import (
    SYNTAXES,
    Said,
    a1111,
    comfyui,
    conjunction,
    from_empty,
    plain,
    plan,
    scale,
    scale_and_keep_mean,
    schedule,
)

# Text made of what means something, so that Hypothesis finds the corners.
SIGNS = ["(", ")", "[", "]", ":", "|", "\\", " ", "1.3", ".5", "-", "BREAK", "AND", "a", ",", "9" * 400, "\n", "é", "🐈", "\ud800"]
texts = st.lists(st.sampled_from(SIGNS), max_size=60).map("".join) | st.text(max_size=80)


def one_section(sections):
    (section,) = sections
    return [(text, pytest.approx(weight)) for text, weight in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("a (b [c) d]", [("a ", 1.0), ("b ", 1.1), ("c", 1.0), (" d", 1 / 1.1)]),
        ("(a: 1.5 ) (b:-.5)", [("a", 1.5), (" ", 1.0), ("b", -0.5)]),
        ("a) b] :1.3) \\x \\\\", [("a) b] :1.3) x \\", 1.0)]),
        ("12:30 (a:b)", [("12:30 ", 1.0), ("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("", []),
    ],
)
def test_a1111_parses(prompt, expected):
    assert one_section(a1111(prompt)) == expected


def test_break_starts_a_section_inside_brackets_too():
    assert a1111("a  BREAK b (c BREAK d:1.5) e") == [[("a", 1.0)], [("b ", 1.0), ("c", 1.5)], [("d", 1.5), (" e", 1.0)]]
    assert a1111("BREAK BREAKFAST break") == [[], [("BREAKFAST break", 1.0)]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("((a)) ((b:1.3) c)", [("a", 1.21), (" ", 1.0), ("b", 1.3), (" c", 1.1)]),
        ("[a] (b", [("[a] (b", 1.0)]),
        ("a (b (c:2) d", [("a (b (c:2) d", 1.0)]),
        (r"\(a\) (b\):2) c)", [("(a) ", 1.0), ("b)", 2.0), (" c)", 1.0)]),
        ("a BREAK b AND c", [("a BREAK b AND c", 1.0)]),
        ("", []),
    ],
)
def test_comfyui_parses(prompt, expected):
    assert one_section(comfyui(prompt)) == expected


def every_step(entries):
    """One text a step, however the entries are grouped."""
    said, last = [], 0
    for end, text in entries:
        said += [text] * (end - last)
        last = end
    return said


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(i, "a" if i % 2 else "(b:1.1)") for i in range(1, 11)]),
        ("[fe|]male", [(i, "female" if i % 2 else "male") for i in range(1, 11)]),
        ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
        ("a [b::0.3]", [(3, "a b"), (10, "a ")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:1.0]", [(1, "a"), (10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:-1]", [(10, "b")]),
        (r"[a\]:b:5]", [(5, r"a\]"), (10, "b")]),
        ("[a:b:c:5]", [(10, "[a:b:c:5]")]),
        ("[a:b] (c:1.2)", [(10, "[a:b] (c:1.2)")]),
    ],
)
def test_schedules(prompt, expected):
    assert every_step(schedule(prompt, 10)) == every_step(expected)


def test_a_schedule_says_each_text_once():
    assert schedule("[fe|||]male", 5) == [(1, "female"), (4, "male"), (5, "female")]
    assert schedule("[a:a:0.5]", 8) == [(8, "a")]


def test_and_separates_prompts_with_weights():
    assert conjunction("a cat AND a dog :0.5") == [("a cat", 1.0), ("a dog", 0.5)]
    assert conjunction("a (cat:1.3) AND b: -1.2 AND c") == [("a (cat:1.3)", 1.0), ("b", -1.2), ("c", 1.0)]
    assert conjunction("SAND and ANDY") == [("SAND and ANDY", 1.0)]
    assert conjunction("at 12:30") == [("at 12:30", 1.0)]


def test_a_plan_puts_schedules_and_conjunctions_together():
    syntax = SYNTAXES["a1111"]
    assert plan("a cat", "", 30, syntax) == [Said(30, (("a cat", 1.0),))]
    assert plan("[a:b:2] AND [c:d:3] :0.3", "x AND [y:z:3]", 4, syntax) == [
        Said(2, (("a", 1.0), ("c", 0.3)), "x AND y"),
        Said(3, (("b", 1.0), ("c", 0.3)), "x AND y"),
        Said(4, (("b", 1.0), ("d", 0.3)), "x AND z"),
    ]
    for name in ("comfyui", "plain"):
        assert plan("[a:b:2] AND c", "[y|z]", 4, SYNTAXES[name]) == [Said(4, (("[a:b:2] AND c", 1.0),), "[y|z]")]


@given(texts)
@settings(deadline=None, max_examples=400)
def test_no_text_raises_and_none_is_lost(text):
    for parse in (a1111, comfyui, plain):
        sections = parse(text)
        assert len(sections) >= 1
        assert all(isinstance(weight, float) for section in sections for _, weight in section)
    said = "".join(t for section in comfyui(text) for t, _ in section)
    assert [c for c in said if c not in "()\\:.-+0123456789 \n"] == [c for c in text if c not in "()\\:.-+0123456789 \n"]


@given(texts, st.integers(1, 12))
@settings(deadline=None, max_examples=400)
def test_a_schedule_covers_the_run(text, steps):
    for ends in ([end for end, _ in schedule(text, steps)], [s.until for s in plan(text, text, steps, SYNTAXES["a1111"])]):
        assert ends == sorted(set(ends))
        assert ends[-1] == steps
        assert ends[0] >= 1


@given(st.text(alphabet=st.characters(exclude_characters="()[]:\\"), max_size=60).filter(lambda t: "BREAK" not in t))
def test_text_without_signs_is_left_alone(text):
    assert "".join(t for t, _ in a1111(text)[0]) == text
    assert "".join(t for t, _ in comfyui(text)[0]) == text
    assert schedule(text, 5) == [(5, text)]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "[" * 10_000 + "]" * 10_000,
        "(" * 10_000 + "a" + ":1.01)" * 10_000,
        "[" * 10_000 + "a|b" + "]" * 10_000,
        "[a:" * 10_000 + ":0.5]" * 10_000,
        "[a(|b" * 10_000 + "]" * 10_000,
        ":" + "1" * 100_000,
        " " * 100_000 + "BREAK",
        "BREAK " * 10_000,
        "a AND " * 10_000,
        "\\" * 100_001,
    ],
)
def test_nesting_and_length_cost_linear_time(text):
    start = time.process_time()
    a1111(text), comfyui(text), plan(text, text, 4, SYNTAXES["a1111"])
    assert time.process_time() - start < 5  # measured: below 0.5; a quadratic reader takes minutes


def test_weights_are_applied_as_each_program_does():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 8, generator=g, dtype=torch.float64) + 0.1
    empty = torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
    w = torch.tensor([[1, 1.3, 1, 0.5, 1], [1, 1, 1, 1, 2.0]], dtype=torch.float64)
    mean_kept = scale_and_keep_mean(z, w, empty)
    for c in range(2):
        for k in range(5):
            assert torch.equal(scale(z, w, empty)[c, k], z[c, k] * w[c, k])
            torch.testing.assert_close(from_empty(z, w, empty)[c, k], (z[c, k] - empty[0, k]) * w[c, k] + empty[0, k])
        scaled = z[c] * w[c, :, None]
        torch.testing.assert_close(mean_kept[c], scaled * (z[c].mean() / scaled.mean()))
    torch.testing.assert_close(mean_kept.mean((1, 2)), z.mean((1, 2)))


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_weight_of_1_is_no_weight(name):
    z, empty = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    torch.testing.assert_close(SYNTAXES[name].weigh(z, torch.ones(1, 4), empty), z)
    if name != "plain":
        assert SYNTAXES[name].parse("a (big:1.0) cat") == SYNTAXES[name].parse("a big cat")
