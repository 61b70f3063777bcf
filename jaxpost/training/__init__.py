"""From a loss function to a trained state: steps, loop, checkpoints, run folder."""

from jaxpost.training._callbacks import Callback, Tracker, make_tracker
from jaxpost.training._checkpoint import (
    CheckpointError,
    Checkpoints,
    Restored,
    checkpoint_hashes,
)
from jaxpost.training._compile import (
    CompiledStep,
    RetraceError,
    compile_step,
    enable_compilation_cache,
)
from jaxpost.training._evaluate import make_eval_fn
from jaxpost.training._fingerprint import fingerprint_params
from jaxpost.training._loop import NonFiniteError, count_tokens, train
from jaxpost.training._optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    decay_mask,
)
from jaxpost.training._performance import Performance, device_peak_flops
from jaxpost.training._preemption import PreemptedError
from jaxpost.training._progress import Progress, make_progress
from jaxpost.training._run_folder import RunFolder, create_run, environment
from jaxpost.training._state import TrainState, init_state
from jaxpost.training._step import describe_nonfinite, make_train_step

__all__ = [
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "CompiledStep",
    "NonFiniteError",
    "OptimizerConfig",
    "Performance",
    "PreemptedError",
    "Progress",
    "Restored",
    "RetraceError",
    "RunFolder",
    "Tracker",
    "TrainState",
    "build_optimizer",
    "build_schedule",
    "checkpoint_hashes",
    "compile_step",
    "count_tokens",
    "create_run",
    "decay_mask",
    "describe_nonfinite",
    "device_peak_flops",
    "enable_compilation_cache",
    "environment",
    "fingerprint_params",
    "init_state",
    "make_eval_fn",
    "make_progress",
    "make_tracker",
    "make_train_step",
    "train",
]
