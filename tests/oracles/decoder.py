"""A decoder from its definitions: float64 NumPy, one row, layer and head at a time.

Reads the parameter tree and the configuration, shares no code with the library.
"""

import math

import numpy as np
from oracles.attention import attention


def hidden_states(params, config, tokens, positions, segment_ids=None):
    """States after the last norm, float64 `[B, T, D]`."""
    params = _float64(params)
    rows = []
    for b in range(tokens.shape[0]):
        segments = np.ones_like(tokens[b]) if segment_ids is None else segment_ids[b]
        rows.append(_row(params, config, tokens[b], positions[b], segments))
    return np.stack(rows)


def logits(params, config, hidden):
    """Final logits, float64 `[B, T, V]`."""
    params = _float64(params)
    if config.tie_embeddings:
        scores = hidden @ params["embed"]["embedding"].T
    else:
        scores = hidden @ params["head"]["kernel"] + params["head"].get("bias", 0.0)
    cap = config.final_softcap
    return scores if cap is None else cap * np.tanh(scores / cap)


def _row(params, config, tokens, positions, segments):
    x = params["embed"]["embedding"][tokens] * config.embed_scale
    frequencies, factor = frequencies_of(config, int(positions.max()))
    for number in range(config.num_layers):
        layer = _slice(params["layers"], number)
        mixed = _norm(x, layer["input_norm"], config)
        mixed = _attention(
            mixed,
            layer["attention"],
            config,
            number,
            positions,
            segments,
            frequencies,
            factor,
        )
        if config.post_norms:
            mixed = _norm(mixed, layer["attention_out_norm"], config)
        x = x + mixed
        inner = _norm(x, layer["mlp_norm"], config)
        gate = _activation(inner @ layer["mlp"]["gate"]["kernel"], config.activation)
        inner = gate * (inner @ layer["mlp"]["up"]["kernel"])
        inner = inner @ layer["mlp"]["down"]["kernel"]
        if config.post_norms:
            inner = _norm(inner, layer["mlp_out_norm"], config)
        x = x + inner
    return _norm(x, params["final_norm"], config)


def _attention(x, weights, config, number, positions, segments, frequencies, factor):
    def project(name):
        kernel = weights[name]["kernel"]
        flat = x @ kernel.reshape(kernel.shape[0], -1)
        return flat.reshape(-1, *kernel.shape[1:]) + weights[name].get("bias", 0.0)

    query, key, value = project("q"), project("k"), project("v")
    if config.qk_norm:
        query = _norm(query, weights["q_norm"], config)
        key = _norm(key, weights["k_norm"], config)
    query = _rotate(query, positions, frequencies, factor)
    key = _rotate(key, positions, frequencies, factor)
    slides = config.layer_windows is None or config.layer_windows[number]
    mixed = attention(
        query[None],
        key[None],
        value[None],
        query_positions=positions[None],
        key_positions=positions[None],
        query_segments=segments[None],
        key_segments=segments[None],
        window=config.sliding_window if slides else None,
        softcap=config.attention_softcap,
        scale=config.query_scale,
    )[0]
    out = mixed.reshape(len(x), -1) @ weights["o"]["kernel"].reshape(-1, x.shape[-1])
    return out + weights["o"].get("bias", 0.0)


def _rotate(x, positions, frequencies, factor):
    """Pairs `(i, i + R/2)` turned by `position * frequency`, one at a time."""
    out = x.copy()
    half = len(frequencies)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            cos = factor * math.cos(position * frequency)
            sin = factor * math.sin(position * frequency)
            out[t, :, i] = x[t, :, i] * cos - x[t, :, i + half] * sin
            out[t, :, i + half] = x[t, :, i + half] * cos + x[t, :, i] * sin
    return out


def frequencies_of(config, last_position):
    """Radians per token of each pair, and the factor on cosines and sines."""
    dim = int(config.head_dim * config.rotary_fraction)
    base = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return [f / scaling.factor for f in base], 1.0
    if scaling.kind == "llama3":
        return [_llama3(f, scaling) for f in base], 1.0
    old = scaling.original_max_positions
    ratio = scaling.factor or config.max_positions / old
    if scaling.kind == "longrope":
        long = last_position + 1 > old
        factors = scaling.long_factor if long else scaling.short_factor
        scale = math.sqrt(1 + math.log(ratio) / math.log(old))
        return [f / g for f, g in zip(base, factors, strict=True)], scale
    return _yarn(base, config, scaling, ratio), 0.1 * math.log(ratio) + 1


def _llama3(frequency, scaling):
    wavelength = 2 * math.pi / frequency
    old, low, high = (
        scaling.original_max_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    if wavelength < old / high:
        return frequency
    if wavelength > old / low:
        return frequency / scaling.factor
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn(base, config, scaling, ratio):
    dim = int(config.head_dim * config.rotary_fraction)

    def dimension(turns):
        length = scaling.original_max_positions / (2 * math.pi * turns)
        return dim * math.log(length) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    out = []
    for i, frequency in enumerate(base):
        ramp = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        out.append(frequency * (1 - ramp) + frequency / ratio * ramp)
    return out


def _norm(x, weights, config):
    if config.norm_kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
    return x * (config.norm_offset + weights["scale"]) + weights.get("bias", 0.0)


def _activation(x, name):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _slice(tree, number):
    if isinstance(tree, dict):
        return {name: _slice(leaf, number) for name, leaf in tree.items()}
    return tree[number]
