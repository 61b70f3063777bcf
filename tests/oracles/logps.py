"""Log-probabilities, entropy and hits in float64 NumPy, token by token in loops."""

import math

import numpy as np


def head_logits(hidden, weight, bias=None, softcap=None, scale=1.0, temperature=1.0):
    """`cap(scale * (hidden @ weight + bias)) / temperature` for `hidden` `[D]`."""
    depth, vocab = weight.shape
    scores = np.zeros(vocab)
    for v in range(vocab):
        total = 0.0 if bias is None else float(bias[v])
        for d in range(depth):
            total += float(hidden[d]) * float(weight[d, v])
        total *= scale
        if softcap is not None:
            total = softcap * math.tanh(total / softcap)
        scores[v] = total / temperature
    return scores


def log_softmax(scores):
    """Log-probabilities `[V]`; a score of -inf keeps probability zero."""
    top = max(scores)
    log_norm = top + math.log(sum(math.exp(s - top) for s in scores))
    return np.array([s - log_norm for s in scores])


def token_stats(hidden, weight, targets, **head):
    """`(logps, entropy, top1)`, each `[B, T]`."""
    batch, length = targets.shape
    logps, entropy, top1 = (np.zeros((batch, length)) for _ in range(3))
    for b in range(batch):
        for t in range(length):
            scores = head_logits(hidden[b, t], weight, **head)
            log_probs = log_softmax(scores)
            logps[b, t] = log_probs[targets[b, t]]
            for log_prob in log_probs:
                if log_prob > -math.inf:
                    entropy[b, t] -= math.exp(log_prob) * log_prob
            best = 0
            for v in range(len(scores)):
                if scores[v] > scores[best]:
                    best = v
            top1[b, t] = float(best == targets[b, t])
    return logps, entropy, top1
