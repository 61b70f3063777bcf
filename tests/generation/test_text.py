"""Text in, text out: stop strings, batches by length, resumable files."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder

from jaxpost import generation
from jaxpost.generation import SamplingConfig
from jaxpost.generation._text import _first_stop

KEY = jax.random.key(5)
# Id 0 begins a text, id 1 ends it; some ids are several characters, and "a" followed by
# "b" reads like id 28, so that one text has several tokenisations.
PIECES = ["", "", *"abcdefghijklmnopqrstuvwxyz", "ab", "cde", "é"]
assert len(PIECES) == VOCAB
CONFIG = SamplingConfig(max_new_tokens=24, stop_ids=(1,))


def encode(text):
    return [0, *(PIECES.index(letter) for letter in text)]


def decode(ids):
    return "".join(PIECES[i] for i in ids)


PROMPTS = ["a", "hello", "", "abcabcabc", "zz"]


@pytest.fixture(scope="module")
def fake():
    fns = FakeDecoder()
    return fns, fns.init(jax.random.key(2))


def texts(fake, prompts=PROMPTS, **kwargs):
    kwargs = {"config": CONFIG, "key": KEY, "batch_size": 4, **kwargs}
    return generation.generate_text(*fake, encode, decode, prompts, **kwargs)


@pytest.fixture(scope="module")
def free(fake):
    """Answers without stop strings."""
    return texts(fake)


def test_answers_are_those_of_generate(fake, free):
    for number, prompt in enumerate(PROMPTS):
        ids = np.array([encode(prompt)])
        rollout = generation.generate(
            *fake,
            ids,
            np.ones(ids.shape, bool),
            config=CONFIG,
            key=KEY,
            sequence_ids=[number],
        )
        answer = free.completions[number]
        length = int(rollout.lengths[0])
        assert answer.tokens == rollout.tokens[0, :length].tolist()
        np.testing.assert_allclose(answer.logps, rollout.logps[0, :length], atol=1e-5)
        drawn = rollout.sampling_logps[0, :length]
        np.testing.assert_allclose(answer.sampling_logps, drawn, atol=1e-5)
        assert answer.prompt_tokens == len(ids[0])
        assert answer.text == decode(answer.tokens)
        assert answer.finish_reason == ("stop" if rollout.finished[0] else "length")


def test_stats_and_progress_count_everything(fake):
    seen = []
    result = texts(fake, progress=seen.append)
    assert [(s.done, s.total) for s in seen] == [(n, 5) for n in range(1, 6)]
    stats = result.stats
    assert seen[-1] == stats
    assert stats.new_tokens == sum(len(c.tokens) for c in result.completions)
    assert stats.prompt_tokens == sum(len(encode(p)) for p in PROMPTS)
    assert stats.finished == sum(c.finish_reason == "stop" for c in result.completions)
    assert stats.tokens_per_s > 0


@pytest.mark.parametrize("check_every", [16, 5, 100])
def test_stop_strings_cut_at_the_first_occurrence(fake, free, check_every):
    # Strings that do occur: across token borders, and in two rows.
    long, longer = sorted((c.text for c in free.completions), key=len)[-2:]
    stops = [long[2:4], longer[9:12], "never there"]
    result = texts(fake, stop_strings=stops, check_every=check_every)
    for answer, before in zip(result.completions, free.completions, strict=True):
        places = [before.text.find(s) for s in stops if s in before.text]
        if not places:
            assert answer == before
            continue
        assert answer.finish_reason == "stop_string"
        assert answer.text == before.text[: min(places)]
        assert answer.tokens == before.tokens[: len(answer.tokens)]
        assert any(s in decode(answer.tokens) for s in stops)
        assert not any(s in decode(answer.tokens[:-1]) for s in stops)
        assert len(answer.logps) == len(answer.tokens)
    reasons = [c.finish_reason for c in result.completions]
    assert reasons.count("stop_string") >= 2


def test_same_text_in_other_tokens_is_found():
    assert _first_stop([28, 4], decode, ("abc",)) == 2
    assert _first_stop([2, 3, 4, 5], decode, ("abc",)) == 3
    assert _first_stop([29, 5], decode, ("d",)) == 1
    assert _first_stop([2, 2], decode, ("abc",)) is None


def test_answers_do_not_depend_on_batches(fake, free):
    alone = texts(fake, batch_size=1)
    for one, other in zip(alone.completions, free.completions, strict=True):
        assert one.tokens == other.tokens
    part = texts(fake, [PROMPTS[3]], sequence_ids=[3])
    assert part.completions[0].tokens == free.completions[3].tokens


def test_no_prompts_is_no_work(fake):
    result = texts(fake, [])
    assert result.completions == []
    assert result.stats.total == 0


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"check_every": 0}, "check_every"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": "END"}, "stop_strings"),
        ({"sequence_ids": [1]}, "sequence_ids"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(fake, kwargs, match):
    with pytest.raises(ValueError, match=match):
        texts(fake, **kwargs)


def test_prompt_without_tokens_is_named(fake):
    with pytest.raises(ValueError, match="prompt 1 .* encodes to no tokens"):
        generation.generate_text(
            *fake,
            lambda text: encode(text)[1:],
            decode,
            ["a", ""],
            config=CONFIG,
            key=KEY,
        )


ROWS = [{"prompt": prompt, "grade": len(prompt)} for prompt in PROMPTS]


def write(fake, path, rows=ROWS, **kwargs):
    kwargs = {"config": CONFIG, "key": KEY, "batch_size": 2, **kwargs}
    return generation.write_completions(path, rows, *fake, encode, decode, **kwargs)


def lines(path):
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def test_file_has_one_line_per_row(fake, free, tmp_path):
    path = tmp_path / "runs" / "out.jsonl"
    seen = []
    stats = write(fake, path, progress=seen.append)
    assert (stats.done, stats.total) == (5, 5)
    assert [s.done for s in seen] == [1, 2, 3, 4, 5]
    rows = lines(path)
    assert list(rows) == [0, 1, 2, 3, 4]
    for number, answer in enumerate(free.completions):
        row = rows[number]
        assert row["prompt"] == PROMPTS[number]
        assert row["grade"] == len(PROMPTS[number])
        assert row["completion"] == answer.text
        assert row["completion_tokens"] == len(answer.tokens)
        assert row["prompt_tokens"] == answer.prompt_tokens
        assert row["finish_reason"] == answer.finish_reason
        np.testing.assert_allclose(row["completion_logp"], sum(answer.logps), atol=1e-3)


def test_resumed_file_equals_an_uninterrupted_one(fake, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    write(fake, whole)
    first = whole.read_bytes().splitlines(keepends=True)
    torn.write_bytes(first[0] + first[3] + first[1][:20])  # killed while writing
    (tmp_path / "whole.settings.json").rename(tmp_path / "torn.settings.json")
    seen = []
    stats = write(fake, torn, progress=seen.append)
    assert (stats.done, stats.total) == (5, 5)
    assert [s.done for s in seen] == [3, 4, 5]
    ours, theirs = lines(torn), lines(whole)
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        assert ours[name]["completion"] == row["completion"]
    before = torn.read_bytes()
    assert write(fake, torn).new_tokens == 0  # nothing left to do
    assert torn.read_bytes() == before


def test_answers_wait_for_those_before_them(fake, free, tmp_path):
    """Lines keep the order of the rows though answers finish in another one."""
    path = tmp_path / "out.jsonl"
    longest = max(range(5), key=lambda n: len(free.completions[n].tokens))
    rows = [ROWS[longest], *(row for row in ROWS if row is not ROWS[longest])]
    sizes = []
    write(fake, path, rows, progress=lambda _: sizes.append(path.stat().st_size))
    assert list(lines(path)) == [0, 1, 2, 3, 4]
    assert sizes[0] == 0  # the first to finish is not the first row
    order = [
        json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()
    ]
    assert order == [row["prompt"] for row in rows]


def test_own_ids_are_kept(fake, tmp_path):
    path = tmp_path / "out.jsonl"
    write(fake, path, [{"id": "x", "prompt": "a"}, {"id": 7, "prompt": "b"}])
    assert lines(path).keys() == {"x", 7}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"text": "a"}], "row 0 needs a text in its column 'prompt'"),
        ([{"prompt": ["a"]}], "row 0"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b"}], "rows 0 and 1 share the id 1"),
        ([{"prompt": "a", "id": 1.5}], "id must be text or integer"),
    ],
    ids=str,
)
def test_bad_rows_are_named(fake, tmp_path, rows, match):
    with pytest.raises(ValueError, match=match):
        write(fake, tmp_path / "out.jsonl", rows)


def test_file_of_another_kind_is_left_alone(fake, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(ValueError, match=r"notes\.txt:1 is not a line of completions"):
        write(fake, path)
    assert path.read_text() == "dear diary\n"
    path.write_text("dear diary")  # no line that was not finished either
    with pytest.raises(ValueError, match=r"is there, but not notes\.settings\.json"):
        write(fake, path)
    assert path.read_text() == "dear diary"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"key": jax.random.key(6)},
            r"with key \[0, 5\], not \[0, 6\]; give that again",
        ),
        (
            {"config": dataclasses.replace(CONFIG, temperature=0.5)},
            "with temperature 1.0, not 0.5",
        ),
        ({"stop_strings": ["q"]}, r"with stop_strings \[\], not \['q'\]"),
        ({"with_ids": True}, "with with_ids False, not True"),
        ({"settings": {"model": "b"}}, "with model 'a', not 'b'"),
        ({"settings": {}}, "with model 'a', not None"),
        ({"rows": ROWS[::-1]}, "is of 5 rows, and the 5 given do not begin with them"),
        ({"rows": ROWS[:3]}, "is of 5 rows, and the 3 given do not begin with them"),
    ],
)
def test_a_file_of_other_answers_is_not_continued(fake, tmp_path, change, match):
    path = tmp_path / "out.jsonl"
    write(fake, path, settings={"model": "a"})
    torn = path.read_bytes()[:-30]
    path.write_bytes(torn)
    about = (tmp_path / "out.settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"out.jsonl .*{match}.*another output file"):
        write(fake, path, **{"settings": {"model": "a"}, **change})
    assert path.read_bytes() == torn
    assert (tmp_path / "out.settings.json").read_bytes() == about


def test_further_rows_follow_those_that_are_answered(fake, tmp_path):
    whole, grown = tmp_path / "whole.jsonl", tmp_path / "grown.jsonl"
    write(fake, whole)
    write(fake, grown, ROWS[:2])
    assert write(fake, grown).done == 5
    ours, theirs = lines(grown), lines(whole)
    assert list(ours) == list(theirs)
    for name, row in theirs.items():
        assert ours[name]["completion"] == row["completion"]
    with pytest.raises(ValueError, match="is of 5 rows"):
        write(fake, grown, ROWS[:2])


def test_functions_may_come_in_any_object(fake, free):
    fns, params = fake
    plain = types.SimpleNamespace(
        apply=fns.apply, unembed=fns.unembed, init_cache=fns.init_cache
    )
    before = generation.trace_counts()
    result = texts((plain, params))
    assert generation.trace_counts() == before  # the functions are known already
    assert result.completions == free.completions
