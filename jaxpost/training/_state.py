"""The training state: everything a step reads and replaces.

Knows nothing of models or losses; the compute dtype is the loss function's business.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpost import ops
from jaxpost.typing import Params


class TrainState(NamedTuple):
    """A pytree; `make_train_step` maps it to the next one.

    Fields:
        step: optimizer steps taken, int32 scalar.
        params: master weights, float32 unless the caller chose otherwise.
        opt_state: Optax state.
        key: PRNG key of the run; never advanced. Step `s` uses `fold_in(key, s)`.
        method_state: the method's memory, any pytree, or None.
        ema: exponential moving average of `params`, or None.
        frozen: parameters that the loss reads but the step never changes, such as the
            base under adapters, or a reference model; nested dict that shares no leaf's
            place with `params`, or None. Not differentiated, without moments, not in
            checkpoints (which hold its fingerprint), not donated by `compile_step`: so
            other holders may share its arrays.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    method_state: Any = None
    ema: Params | None = None
    frozen: Params | None = None

    def joined(self, *, use_ema: bool = False) -> Params:
        """What the loss function is given: `params`, or `ema`, with `frozen`.

        Raises:
            ValueError: a leaf is both trained and frozen.
        """
        return ops.join_trees(self.ema if use_ema else self.params, self.frozen)


def split_frozen(state: Any) -> tuple[Any, Params | None]:
    """The state without its frozen parameters, and these; for a state of any type."""
    if not isinstance(state, TrainState) or state.frozen is None:
        return state, None
    return state._replace(frozen=None), state.frozen


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    method_state: Any = None,
    ema: bool | Params | None = None,
    frozen: Params | None = None,
    master_dtype: Any = jnp.float32,
    copy: bool = True,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        params: pytree of arrays; floating leaves narrower than `master_dtype` are
            widened (bfloat16 weights do not move at small learning rates). Wider
            leaves stay as they are. Shardings are kept.
        tx: optimizer; its moments get the dtype and sharding of the master weights.
        key: PRNG key of the run.
        method_state: the method's memory, any pytree.
        ema: True starts a moving average at `params`; a pytree continues one.
        frozen: parameters that stay as they are, neither copied nor widened; see
            `TrainState`.
        master_dtype: dtype of the master weights, or None to leave `params` alone.
        copy: copy the leaves that need no widening. The compiled step donates its
            state, so without a copy the caller's `params` are gone after the first
            step; pass False if nothing else holds them.

    Returns:
        State with `step == 0`.

    Raises:
        ValueError: a leaf is both in `params` and in `frozen`.
    """
    ops.join_trees(params, frozen)

    def master(leaf):
        leaf = jnp.asarray(leaf)
        if master_dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            wide = jnp.promote_types(leaf.dtype, master_dtype)
            if wide != leaf.dtype:
                return leaf.astype(wide)
        return jnp.copy(leaf) if copy else leaf

    params = jax.tree.map(master, params)
    if ema is True:
        ema = jax.tree.map(jnp.copy, params)
    elif ema is False:
        ema = None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        key=key,
        method_state=method_state,
        ema=ema,
        frozen=frozen,
    )
