"""Windows: the marked part of a document, and z along it."""

import numpy as np
import pytest
from oracles import watermark as oracle

from jaxpost.generation import watermark
from jaxpost.generation._watermark_windows import window_sizes


def marks_of(scored, green) -> watermark.TokenMarks:
    scored, green = np.atleast_2d(scored), np.atleast_2d(green)
    return watermark.TokenMarks(scored, green, np.zeros_like(scored))


@pytest.fixture(scope="module")
def documents():
    """Six of 300 tokens, half of them scored; the last has a marked part."""
    rng = np.random.default_rng(0)
    scored = rng.random((6, 300)) < 0.5
    green = rng.random((6, 300)) < 0.25
    green[5, 100:200] = rng.random(100) < 0.9
    scored[4] = False
    scored[4, :10] = True
    return marks_of(scored, green)


def test_the_best_window_is_that_of_a_search_over_all(documents):
    sizes = (16, 23, 32, 45, 64)
    found = watermark.best_windows(documents, gamma=0.25, sizes=sizes)
    for row, window in enumerate(found):
        columns = np.flatnonzero(documents.scored[row])
        hits = documents.green[row][columns]
        looks = []
        for size in sizes:
            for start in range(len(columns) - size + 1):
                green = int(hits[start : start + size].sum())
                looks.append((oracle.tail(green, size, 0.25), green, size))
        if not looks:
            assert window is None
            continue
        least = min(looks)
        assert window is not None
        assert window.windows == len(looks)
        assert window.p == pytest.approx(min(1.0, least[0] * len(looks)), rel=1e-9)
        inside = slice(window.start, window.end)
        assert documents.scored[row, inside].sum() == window.scored
        assert (documents.scored & documents.green)[row, inside].sum() == window.green
        z, _ = oracle.z_and_p(window.green, window.scored, 0.25)
        assert window.z == pytest.approx(z)


def test_a_marked_part_is_found_where_it_is(documents):
    *others, marked = watermark.best_windows(documents, gamma=0.25)
    assert marked is not None
    assert marked.p < 1e-8
    inside = min(marked.end, 200) - max(marked.start, 100)
    assert inside > 0.8 * (marked.end - marked.start)
    assert all(window is None or window.p > 1e-3 for window in others)


def test_chance_stands_out_no_oftener_than_its_p_says():
    rng = np.random.default_rng(1)
    scored = np.ones((2000, 128), bool)
    marks = marks_of(scored, rng.random(scored.shape) < 0.25)
    p = np.array([w.p for w in watermark.best_windows(marks, gamma=0.25) if w])
    assert len(p) == 2000
    for level in (0.01, 0.05, 0.1):
        spread = np.sqrt(level * (1 - level) / len(p))
        assert np.mean(p <= level) < level + 3 * spread


def test_sliding_z_is_that_of_a_loop(documents):
    found = watermark.sliding_z(documents, gamma=0.25, size=20)
    for row in range(6):
        hits: list[int] = []
        for place in range(300):
            if documents.scored[row, place]:
                hits.append(int(documents.green[row, place]))
            if len(hits) < 20:
                assert np.isnan(found[row, place])
            else:
                z, _ = oracle.z_and_p(sum(hits[-20:]), 20, 0.25)
                assert found[row, place] == pytest.approx(z)


def test_sizes_grow_by_the_square_root_of_two():
    assert window_sizes(15) == ()
    assert window_sizes(64) == (16, 23, 32, 45, 64)


def test_windows_that_cannot_be(documents):
    with pytest.raises(ValueError, match="window sizes must be at least 1"):
        watermark.best_windows(documents, gamma=0.25, sizes=(0,))
    with pytest.raises(ValueError, match="size must be at least 1"):
        watermark.sliding_z(documents, gamma=0.25, size=0)
    short = marks_of(np.ones((1, 4), bool), np.ones((1, 4), bool))
    assert watermark.best_windows(short, gamma=0.25) == [None]
