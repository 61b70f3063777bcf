"""Static description of a decoder: one frozen dataclass for every family.

Knows no arrays and no file formats; `weights` translates other people's config files.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Literal

RopeKind = Literal["linear", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("linear", "llama3", "yarn", "longrope")
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
EXPERT_FAMILIES = ("mixtral", "qwen3_moe", "phimoe")
REMAT_POLICIES = ("none", "full", "dots")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
ALL_LINEAR = "all-linear"
_HF_TARGETS = {f"{name}_proj": (name,) for name in LORA_TARGETS} | {
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    ALL_LINEAR: LORA_TARGETS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than pre-training's.

    Fields:
        kind: "linear" divides every frequency by `factor`; "llama3" only the low ones,
            smoothly; "yarn" ramps between both by dimension; "longrope" (Phi-3) divides
            each dimension by its own factor, the long ones once a row reaches
            `original_max_positions`.
        factor: ratio of the new context to the old one; None with "yarn" and "longrope"
            takes `max_positions / original_max_positions`.
        original_max_positions: context of pre-training, tokens.
        low_freq_factor, high_freq_factor: "llama3" only.
        beta_fast, beta_slow, truncate, mscale, mscale_all_dim: "yarn" only.
        short_factor, long_factor: "longrope" only, one number per rotated pair.
        attention_factor: factor on cosines and sines ("yarn", "longrope"); None takes
            the published formula.

    Raises:
        ValueError: unknown kind, or a number that the kind needs is missing.
    """

    kind: RopeKind
    factor: float | None = None
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"RopeScaling.kind must be one of {', '.join(ROPE_KINDS)}, "
                f"got {self.kind!r}."
            )
        needed = {
            "linear": ("factor",),
            "llama3": (
                "factor",
                "original_max_positions",
                "low_freq_factor",
                "high_freq_factor",
            ),
            "yarn": ("original_max_positions",),
            "longrope": ("original_max_positions", "short_factor", "long_factor"),
        }[self.kind]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"RopeScaling of kind {self.kind!r} needs {', '.join(missing)}."
            )
        if self.factor is not None and self.factor < 1.0:
            raise ValueError(
                f"RopeScaling.factor must be at least 1, got {self.factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts feed-forward block.

    Fields:
        num_experts: experts per layer.
        experts_per_token: how many of them each token visits.
        expert_size: width of one expert; None takes `intermediate_size`.
        normalize_weights: the chosen experts' router weights sum to one.
        router_loss_weight: coefficient of the load-balancing term in `aux`.
        router_jitter: half width of PhiMoE's SparseMixer band.

    Raises:
        ValueError: a count is not positive, or more experts per token than experts.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int | None = None
    normalize_weights: bool = True
    router_loss_weight: float = 0.0
    router_jitter: float = 0.0

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                "MoEConfig needs 1 <= experts_per_token <= num_experts, got "
                f"experts_per_token={self.experts_per_token}, "
                f"num_experts={self.num_experts}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: `y = x W + (alpha / rank) (x A) B`, `A` and `B` trained.

    Fields:
        rank: columns of `A [in, rank]` and rows of `B [rank, out]`.
        alpha: numerator of the factor; twice the rank is a common choice.
        targets: which products have adapters: q, k, v, o, gate, up, down, or Hugging
            Face's names for them (`q_proj`, Phi-3's fused `qkv_proj` and
            `gate_up_proj`), or `all-linear`. Kept in the order above.

    Raises:
        ValueError: `rank` or `alpha` is not positive; a target is unknown, or none.

    Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
    equation 3.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"LoraConfig.rank must be a positive integer, got {self.rank!r}."
            )
        if not self.alpha > 0:
            raise ValueError(f"LoraConfig.alpha must be positive, got {self.alpha!r}.")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "targets", _lora_targets(self.targets))

    @property
    def scale(self) -> float:
        """The factor `alpha / rank`."""
        return self.alpha / self.rank


def _lora_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """Our names of the products that `targets` names, in our order."""
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen: set[str] = set()
    for name in names:
        if name in LORA_TARGETS:
            chosen.add(name)
        elif name in _HF_TARGETS:
            chosen.update(_HF_TARGETS[name])
        else:
            known = (*LORA_TARGETS, *_HF_TARGETS)
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"LoraConfig.targets names {name!r}, which is not known.{hint} Known "
                f"are {', '.join(known)}."
            )
    if not chosen:
        raise ValueError(
            f"LoraConfig.targets is empty; name some of {', '.join(LORA_TARGETS)}, or "
            f"{ALL_LINEAR!r}."
        )
    return tuple(name for name in LORA_TARGETS if name in chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that shapes a decoder; hashable, so it is static under `jit`.

    Fields:
        family: which published architecture, for file formats; the other fields alone
            decide the computation.
        vocab_size, hidden_size, intermediate_size, num_layers: `V`, `D`, `F`, `L`.
        num_heads, num_kv_heads, head_dim: `N`, `K`, `H`; `H` is never inferred.
        max_positions: longest context the model is meant for, tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, or None.
        rotary_fraction: share of `head_dim` that is rotated (Phi-4-mini: 0.75).
        norm_eps: added to the mean square (or variance) before the root.
        norm_kind: "rms", or "layer" with mean and bias.
        norm_offset: the scale that is applied is `norm_offset + scale` (Gemma: 1).
        activation: of the gate, "silu" or "gelu_tanh".
        attention_bias: biases on query, key and value projections.
        attention_out_bias: bias on the attention's output projection.
        qk_norm: root-mean-square norm over `head_dim` of queries and keys (Qwen3).
        sliding_window: keys at distance `>= sliding_window` are not seen, tokens.
        layer_windows: which layers slide; None means all, if there is a window.
        attention_softcap, final_softcap: `cap * tanh(x / cap)` on scores and logits.
        query_scale: factor on attention scores; None is `head_dim ** -0.5`.
        embed_scale: factor on embeddings (Gemma: `sqrt(D)`).
        post_norms: norms after attention and feed-forward too (Gemma 2).
        tie_embeddings: the head is the transposed embedding.
        head_bias: the head has a bias (untied heads only).
        head: what the last states become: "vocabulary", logits over it; "score", one
            number at every token (reward and value models), without an output head.
        remat: what the backward pass recomputes: "none", only what is elementwise
            (which is faster than storing it); "dots", attention too; "full", each layer
            from its input.
        attention_implementation: passed to `ops.attention`; None chooses. Single tokens
            with a cache go through `ops.cached_attention` instead.
        experts: mixture of experts in place of the feed-forward block, or None.
        lora: adapters beside the matrix products, or None.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown choice.
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    norm_eps: float = 1e-5
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_windows: tuple[bool, ...] | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    query_scale: float | None = None
    embed_scale: float = 1.0
    post_norms: bool = False
    tie_embeddings: bool = False
    head_bias: bool = False
    head: Literal["vocabulary", "score"] = "vocabulary"
    remat: Literal["none", "full", "dots"] = "none"
    attention_implementation: str | None = None
    experts: MoEConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        self._check_choices()
        self._check_sizes()
        self._check_windows()
        self._check_rope()

    def _check_choices(self):
        for name, choices in (
            ("family", DENSE_FAMILIES + EXPERT_FAMILIES),
            ("norm_kind", ("rms", "layer")),
            ("activation", ("silu", "gelu_tanh")),
            ("remat", REMAT_POLICIES),
            ("head", ("vocabulary", "score")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"DecoderConfig.{name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.head_bias and (self.tie_embeddings or self.head == "score"):
            raise ValueError(
                "DecoderConfig.head_bias needs an untied head over the vocabulary; set "
                "tie_embeddings=False and head='vocabulary', or head_bias=False."
            )

    def _check_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"DecoderConfig.{name} must be a positive integer, got {value!r}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig.num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})."
            )
        for name in ("attention_softcap", "final_softcap", "query_scale", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"DecoderConfig.{name} must be positive, got {value!r}."
                )

    def _check_windows(self):
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                "DecoderConfig.sliding_window must be at least 1 token (a token sees "
                f"itself) or None, got {self.sliding_window}."
            )
        if self.layer_windows is None:
            return
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"DecoderConfig.layer_windows has {len(self.layer_windows)} entries "
                f"for num_layers={self.num_layers}; give one per layer."
            )
        if any(self.layer_windows) and self.sliding_window is None:
            raise ValueError(
                "DecoderConfig.layer_windows marks sliding layers but sliding_window "
                "is None; set its length in tokens."
            )

    def _check_rope(self):
        if not 0.0 < self.rotary_fraction <= 1.0 or self.rotary_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim ({self.head_dim}) times rotary_fraction "
                f"({self.rotary_fraction}) must be a positive even number of rotated "
                f"dimensions, got {self.rotary_dim}."
            )
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if len(factors) != self.rotary_dim // 2:
                raise ValueError(
                    f"RopeScaling.{name} has {len(factors)} entries, expected "
                    f"{self.rotary_dim // 2} (half of the rotated dimensions)."
                )

    @property
    def rotary_dim(self) -> int:
        """How many of the `head_dim` dimensions are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    def window_of(self, layer: int) -> int | None:
        """Window of one layer in tokens, None if it sees everything."""
        slides = self.layer_windows is None or self.layer_windows[layer]
        return self.sliding_window if slides else None

    def lora_of(self, name: str) -> LoraConfig | None:
        """The adapter of one product (`q`, ..., `down`), None if it has none."""
        has = self.lora is not None and name in self.lora.targets
        return self.lora if has else None

    def replace(self, **changes) -> "DecoderConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
