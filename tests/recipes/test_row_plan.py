"""How answers are laid out in rows: what is chosen, and what it was reckoned from."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import data
from jaxpost.ops import _attention_chunked as chunked
from jaxpost.recipes import _row_plan


def test_answers_begin_where_blocks_do_only_if_that_makes_no_wider_row():
    plan = _row_plan.Plan(2, (16, 28, 32), 8)
    prompt = np.arange(5)
    for lengths, chosen in (
        ((4, 4), (16, 1)),  # 13 columns, or 20
        ((8, 8), (28, 1)),  # 21, or 24, but 28 is no multiple of 8
        ((8, 16), (32, 8)),  # 29, or 32
        ((13, 14), (32, 1)),  # 32, or 38
    ):
        answers = [np.arange(n) for n in lengths]
        assert plan.choose([prompt], [answers]) == chosen


def pairs_looked_at(prompt, answer, count, width, align):
    """In a row of that width, by the blocks that chunked attention goes through."""
    prompts, answers = [range(prompt)], [[range(answer)] * count]
    row = data.join_samples(prompts, answers, width, align=align)
    blocks = -(-width // 128)
    positions, segments = (
        jnp.asarray(np.pad(row[name], ((0, 0), (0, -width % blocks))))
        for name in ("positions", "segment_ids")
    )
    layout = chunked._Layout(blocks, blocks, 1, 1, None, 1.0)
    mask = (positions, positions, segments, segments, None)
    _, counts = chunked._seen_blocks(chunked._mask_blocks(mask, layout))
    return int(counts.sum()) * (positions.shape[1] // blocks) ** 2


@pytest.mark.parametrize(
    ("count", "prompt", "answer", "align"),
    [
        (8, 64, 128, 128),
        (4, 128, 380, 128),
        (4, 300, 256, 128),
        (4, 20, 90, 1),
        (8, 40, 60, 1),
    ],
)
def test_pairs_are_those_of_the_blocks_looked_at(count, prompt, answer, align):
    """Rows with gaps exactly, others about."""
    plan = _row_plan.plan_rows(
        samples=8, answers_per_row=count, prompt=prompt, answer=answer, hidden=128
    )
    assert plan.align == align
    width, chosen = plan.choose([range(prompt)], [[range(answer)] * count])
    assert (width, chosen) == (plan.widths[-1], align)
    found = pairs_looked_at(prompt, answer, count, width, align)
    if align > 1:
        assert found == _row_plan._aligned_pairs(count, prompt, answer, 128)
    else:
        estimate = _row_plan._dense_pairs(width, prompt, answer, 128)
        assert estimate == pytest.approx(found, rel=0.25)


def test_the_cheapest_rows_are_chosen():
    """By operations counted: long prompts are shared, those of long answers are not."""
    long_prompt = _row_plan.plan_rows(
        samples=8, answers_per_row=None, prompt=512, answer=16, hidden=256
    )
    assert long_prompt.answers == 8
    assert long_prompt.align == 1  # blocks of 128 for answers of 16
    long_answer = _row_plan.plan_rows(
        samples=8, answers_per_row=None, prompt=16, answer=4096, hidden=256
    )
    assert long_answer.answers == 1
    assert all(width % 64 == 0 for width in long_answer.widths)
    assert long_answer.widths[-1] >= 16 + 4096
    whole_blocks = _row_plan.plan_rows(
        samples=8, answers_per_row=None, prompt=64, answer=128, hidden=256
    )
    assert (whole_blocks.answers, whole_blocks.align) == (8, 128)
    assert whole_blocks.widths[-1] == 128 + 8 * 128
