"""Advantages and policy losses from their papers: float64, one step at a time."""

import math

import numpy as np


def gae(rewards, values, mask, terminals, bootstrap, gamma, gae_lambda):
    """`(advantages, returns)` by eq. 16 of arXiv 1506.02438 as the sum it is.

    A row's steps are first gathered into a list without gaps; each advantage is then
    summed forwards on its own, `sum over l of (gamma lambda)^l delta[t + l]`.
    """
    rows, columns = np.shape(mask)
    advantages, returns = np.zeros((rows, columns)), np.zeros((rows, columns))
    for b in range(rows):
        steps = [t for t in range(columns) if mask[b][t]]
        deltas = []
        for place, t in enumerate(steps):
            last = place + 1 == len(steps)
            following = bootstrap[b] if last else values[b][steps[place + 1]]
            if terminals[b][t]:
                following = 0.0
            deltas.append(rewards[b][t] + gamma * following - values[b][t])
        for place, t in enumerate(steps):
            total, weight = 0.0, 1.0
            for later in range(place, len(steps)):
                total += weight * deltas[later]
                if terminals[b][steps[later]]:
                    break
                weight *= gamma * gae_lambda
            advantages[b][t] = total
            returns[b][t] = total + values[b][t]
    return advantages, returns


def whiten(values, mask, ddof, eps):
    kept = [v for v, m in zip(values.ravel(), mask.ravel(), strict=True) if m]
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - ddof)
    found = np.zeros(values.shape)
    for place in np.ndindex(values.shape):
        if mask[place]:
            found[place] = (values[place] - mean) / math.sqrt(variance + eps)
    return found


def group_relative(rewards, mask, eps, ddof):
    found = np.zeros(rewards.shape)
    for b, row in enumerate(rewards):
        kept = [r for r, m in zip(row, mask[b], strict=True) if m]
        if len(kept) <= max(ddof, 1):
            continue
        mean = sum(kept) / len(kept)
        std = math.sqrt(sum((r - mean) ** 2 for r in kept) / (len(kept) - ddof))
        for g, r in enumerate(row):
            if mask[b][g]:
                found[b][g] = (r - mean) / (std + eps)
    return found


def leave_one_out(rewards, mask):
    found = np.zeros(rewards.shape)
    for b, row in enumerate(rewards):
        for g, r in enumerate(row):
            others = [x for i, x in enumerate(row) if i != g and mask[b][i]]
            if mask[b][g] and others:
                found[b][g] = r - sum(others) / len(others)
    return found


def clipped_policy(logp, old_logp, advantage, clip_low, clip_high, dual_clip=None):
    """One step: eq. 7 of arXiv 1707.06347 negated; eq. 5 of arXiv 1912.09729."""
    ratio = math.exp(logp - old_logp)
    clipped = min(max(ratio, 1.0 - clip_low), 1.0 + clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual_clip is not None and advantage < 0.0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def clipped_value(value, old_value, wanted, clip=None):
    plain = (value - wanted) ** 2
    if clip is None:
        return plain / 2.0
    near = min(max(value, old_value - clip), old_value + clip)
    return max(plain, (near - wanted) ** 2) / 2.0


def answer_sums(values, ids, answers):
    sums = np.zeros((len(values), answers))
    for b, row in enumerate(ids):
        for w, answer in enumerate(row):
            if 0 <= answer < answers:
                sums[b][answer] += values[b][w]
    return sums


def divided_loss(values, ids, answers, divide_by, max_tokens):
    """The loss of a batch of tokens, answer by answer.

    `token`: arXiv 2503.14476, section 3.3; `sequence`: arXiv 2402.03300, eq. 3;
    `constant`: arXiv 2503.20783, section 3.
    """
    rows = []  # of each row, of each answer, its tokens' values
    for row_values, row in zip(values, ids, strict=True):
        groups = [[] for _ in range(answers)]
        for value, answer in zip(row_values, row, strict=True):
            if answer >= 0:
                groups[answer].append(value)
        rows.append([group for group in groups if group])

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    found = [group for groups in rows for group in groups]
    if divide_by == "token":
        return mean([value for group in found for value in group])
    if divide_by == "sequence":
        return mean([mean(group) for group in found])
    if divide_by == "group":
        return mean([mean([v for g in groups for v in g]) for groups in rows if groups])
    return mean([sum(group) / max_tokens for group in found])


def importance_weight(logp, sampling_logp, cap):
    return min(math.exp(logp - sampling_logp), cap)
