"""A small tokenizer of one's own: words whole, digits one by one, bytes for the rest.

For models trained from nothing on a small world, where words as tokens keep sequences
short and single digits make arithmetic learnable. Any text can be encoded, and decoding
gives it back exactly. Knows no data set.
"""

import collections
from collections.abc import Iterable, Sequence

from jaxpost.data._tokenizer import Tokenizer, make_tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

# A word, a digit or a run of marks, each with the blank before it; other white space.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def train_word_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    specials: Sequence[str] = (BOS, EOS, PAD),
) -> Tokenizer:
    """Makes a tokenizer whose tokens are the commonest words of `texts`.

    The vocabulary holds the special tokens, the 256 bytes, and then words by falling
    count. A digit is always a token of its own (`" 4"` and `"4"` are two). A word
    outside the vocabulary is spelled in bytes, so nothing is unknown.

    Args:
        texts: read once.
        vocab_size: most tokens, at least 256 and the specials; fewer are made where
            `texts` has fewer words.
        specials: beginning, end and padding; never found in ordinary text.

    Returns:
        A tokenizer of the byte-level BPE kind without merges, that `Tokenizer.save`
        and transformers write and read. It puts the beginning token before plain text.

    Raises:
        ValueError: `vocab_size` is too small, or there are not three distinct specials.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    if len(specials) != 3 or len(set(specials)) != 3:
        raise ValueError(f"specials must be three distinct tokens, got {specials!r}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(specials) - len(alphabet)
    if room < 0:
        raise ValueError(
            f"vocab_size must be at least {len(specials) + len(alphabet)} (special "
            f"tokens and bytes), got {vocab_size}."
        )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = collections.Counter(
        piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)
    )
    words = [piece for piece in counts if len(piece) > 1 and piece not in specials]
    words.sort(key=lambda piece: (-counts[piece], piece))
    vocabulary = [*specials, *alphabet, *words[:room]]
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    # `ignore_merges` looks a whole piece up before spelling it: words need no merges.
    backend = Backend(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    backend.pre_tokenizer = splitter  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{specials[0]} $A",
        special_tokens=[(specials[0], ids[specials[0]])],
    )
    backend.add_special_tokens(list(specials))
    special_ids = {
        "bos_token_id": ids[specials[0]],
        "eos_token_id": ids[specials[1]],
        "pad_token_id": ids[specials[2]],
    }
    return make_tokenizer(backend, special_ids, name="words")
