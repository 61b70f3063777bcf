"""A small model of Python code, made on this machine: no download.

A byte-pair tokenizer and a decoder of about a million parameters, both trained on
`builtin:python-stdlib` by the recipe of `recipes/sft.py`.
"""

import dataclasses
import json
import pathlib
import time

from jaxpost import data, models, training, weights
from jaxpost.recipes import sft
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    MeshSection,
    ModelSection,
    TrainSection,
)

SOURCE = "builtin:python-stdlib"
SPECIALS = ("<bos>", "<eos>", "<pad>")


@dataclasses.dataclass(frozen=True)
class CodeModel:
    """What is trained.

    Fields:
        vocab_size: pieces of the tokenizer.
        width, layers: of the decoder.
        length: tokens of a packed row; a longer function is cut off.
        rows: packed rows per step.
        steps: optimizer steps.
        rate: peak learning rate.
        seed: of fresh weights and the order of the data.
    """

    vocab_size: int = 2048
    width: int = 128
    layers: int = 4
    length: int = 256
    rows: int = 16
    steps: int = 600
    rate: float = 6e-3
    seed: int = 0


def load_code_model(
    settings: CodeModel, folder: pathlib.Path
) -> tuple[models.Model, data.Tokenizer, dict[str, float]]:
    """The model and its tokenizer from `folder`, trained there first if need be.

    Returns:
        Both, and the seconds and CPU seconds that training them took.
    """
    export, took = folder / "model" / "export", folder / "took.json"
    if not took.exists():
        began, cpu = time.perf_counter(), time.process_time()
        _train_tokenizer(settings.vocab_size).save(folder / "tokenizer")
        sft.run(_sft_config(settings, folder))
        spent = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        }
        took.write_text(json.dumps(spent) + "\n", encoding="utf-8")
    spent = json.loads(took.read_text(encoding="utf-8"))
    return weights.load(export), data.load_tokenizer(export), spent


def _train_tokenizer(vocab_size: int) -> data.Tokenizer:
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = (row["prompt"] + row["completion"] for row in data.stdlib_rows("train"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ids = [backend.token_to_id(special) for special in SPECIALS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], ids[0])]
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return data.make_tokenizer(
        backend, dict(zip(names, ids, strict=True)), name="python-stdlib"
    )


def _sft_config(settings: CodeModel, folder: pathlib.Path) -> sft.SFTConfig:
    return sft.SFTConfig(
        name="model",
        run_root=str(folder),
        seed=settings.seed,
        mesh=MeshSection(devices=1),
        model=ModelSection(
            tokenizer=str(folder / "tokenizer"),
            family="qwen3",  # normalised queries and keys bear the high learning rate
            tie_embeddings=False,
            hidden_size=settings.width,
            intermediate_size=11 * settings.width // 4,
            num_layers=settings.layers,
            num_heads=4,
            num_kv_heads=4,
            max_positions=2 * settings.length,
        ),
        data=DataSection(
            train=SOURCE,
            eval=SOURCE,
            loss_on="all",
            max_length=settings.length,
            on_too_long="truncate",
        ),
        optimizer=training.OptimizerConfig(
            name="muon",  # fewer steps than AdamW to the same loss, at this size
            learning_rate=settings.rate,
            schedule="wsd",
            decay_fraction=0.6,
            warmup_fraction=0.03,
            final_fraction=0.02,
            b1=0.95,
            b2=0.98,
            weight_decay=0.01,
        ),
        train=TrainSection(
            steps=settings.steps,
            batch_size=settings.rows,
            eval_every=max(1, settings.steps // 4),
            keep_last=1,
            sample_prompts=3,
        ),
        export=ExportSection(license="PSF-2.0"),
    )
