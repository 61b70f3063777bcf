"""Records to tokens to batches: NumPy in memory, no devices.

Reads rows (JSONL, Parquet, hub, built-in), names their columns, renders and tokenises
them with exact masks, packs or pads them, and keeps the order of training. Knows no
model and no loss.
"""

from jaxpost.data._arithmetic import (
    arithmetic_problem,
    arithmetic_rows,
    arithmetic_split,
    arithmetic_text_rows,
    check_arithmetic,
    check_arithmetic_work,
)
from jaxpost.data._arithmetic_pairs import (
    arithmetic_negative_rows,
    arithmetic_pair_rows,
)
from jaxpost.data._batches import Batches
from jaxpost.data._branches import (
    join_answers,
    join_samples,
    joined_length,
    joined_widths,
)
from jaxpost.data._check import DataCheck, DataProblem, check_data
from jaxpost.data._columns import (
    Format,
    Kind,
    normalize_row,
    row_kind,
    split_preference,
)
from jaxpost.data._encode import (
    Example,
    LossOn,
    OnTooLong,
    Pair,
    encode_pair,
    encode_prompt,
    encode_row,
    example_id,
)
from jaxpost.data._errors import BadRow, BadRows, DataError, OnBadRow
from jaxpost.data._load import load_examples, load_pairs, load_rows
from jaxpost.data._negatives import (
    ANSWER_ARRAYS,
    POSITIVE,
    AnswerBatches,
    Answers,
    check_distinct,
    drop_answers,
    encode_answers,
    equal_answers,
    load_answers,
    pad_answers,
    repeated_answers,
)
from jaxpost.data._packing import (
    TokenRow,
    pack,
    packing_efficiency,
    pad,
    pad_batch,
    stack,
)
from jaxpost.data._pairs import (
    CHOSEN,
    REJECTED,
    join_ids,
    pad_pairs,
    split_id,
    with_columns,
)
from jaxpost.data._prompts import Prompt, load_prompts, number_prompts
from jaxpost.data._records import Row, read_jsonl
from jaxpost.data._show import (
    TokenView,
    render_check,
    render_text,
    render_tokens,
    view_tokens,
)
from jaxpost.data._sources import fingerprint, read_rows
from jaxpost.data._stdlib import stdlib_fingerprint, stdlib_functions, stdlib_rows
from jaxpost.data._tokenizer import (
    Tokenizer,
    check_vocab,
    load_tokenizer,
    make_tokenizer,
)
from jaxpost.data._train_tokenizer import train_word_tokenizer

__all__ = [
    "ANSWER_ARRAYS",
    "CHOSEN",
    "POSITIVE",
    "REJECTED",
    "AnswerBatches",
    "Answers",
    "BadRow",
    "BadRows",
    "Batches",
    "DataCheck",
    "DataError",
    "DataProblem",
    "Example",
    "Format",
    "Kind",
    "LossOn",
    "OnBadRow",
    "OnTooLong",
    "Pair",
    "Prompt",
    "Row",
    "TokenRow",
    "TokenView",
    "Tokenizer",
    "arithmetic_negative_rows",
    "arithmetic_pair_rows",
    "arithmetic_problem",
    "arithmetic_rows",
    "arithmetic_split",
    "arithmetic_text_rows",
    "check_arithmetic",
    "check_arithmetic_work",
    "check_data",
    "check_distinct",
    "check_vocab",
    "drop_answers",
    "encode_answers",
    "encode_pair",
    "encode_prompt",
    "encode_row",
    "equal_answers",
    "example_id",
    "fingerprint",
    "join_answers",
    "join_ids",
    "join_samples",
    "joined_length",
    "joined_widths",
    "load_answers",
    "load_examples",
    "load_pairs",
    "load_prompts",
    "load_rows",
    "load_tokenizer",
    "make_tokenizer",
    "normalize_row",
    "number_prompts",
    "pack",
    "packing_efficiency",
    "pad",
    "pad_answers",
    "pad_batch",
    "pad_pairs",
    "read_jsonl",
    "read_rows",
    "render_check",
    "render_text",
    "render_tokens",
    "repeated_answers",
    "row_kind",
    "split_id",
    "split_preference",
    "stack",
    "stdlib_fingerprint",
    "stdlib_functions",
    "stdlib_rows",
    "train_word_tokenizer",
    "view_tokens",
    "with_columns",
]
