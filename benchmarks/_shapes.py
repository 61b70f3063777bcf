"""The one table of shapes that kernel benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder's arrays; letters as in the style guide.

    Fields:
        batch, length: `B`, `T`.
        width: `D`.
        vocab: `V`.
        heads, kv_heads, head_dim: `N`, `K`, `H`.
    """

    batch: int
    length: int
    width: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SHAPES = {
    # seconds on a laptop: to see that a benchmark runs
    "tiny": Shape(4, 64, 64, 2048, 4, 2, 16),
    # the model of bench_sft.py and bench_generate.py, Llama 2's vocabulary
    "small": Shape(8, 512, 256, 32000, 8, 4, 32),
    # Llama 3's vocabulary over a narrow model: the head is everything
    "wide-vocab": Shape(8, 512, 512, 128256, 8, 4, 64),
}
