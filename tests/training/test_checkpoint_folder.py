"""Checkpoints: what comes back, what is kept, and what survives failures."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost import training

HERE = pathlib.Path(__file__).parent


class Memory(NamedTuple):
    log_u: jax.Array
    empty: jax.Array
    key: jax.Array
    host: np.ndarray
    count: int


def make_state(fill=1.0, seed=3):
    params = {"a/b": jnp.full((2, 3), fill), "low": jnp.full(4, fill, jnp.bfloat16)}
    memory = Memory(
        log_u=jnp.full(5, fill),
        empty=jnp.zeros((0, 2)),
        key=jax.random.key(seed + 1),
        host=np.arange(3, dtype=np.int64),
        count=int(fill),
    )
    return training.init_state(
        params,
        optax.adamw(0.1),
        jax.random.key(seed),
        method_state=memory,
        ema=True,
        master_dtype=None,
    )


def comparable(tree):
    """Keys as their data, so that trees compare."""

    def plain(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(plain, tree)


def test_everything_comes_back(tmp_path):
    saved, rng = make_state(fill=2.0), np.random.default_rng(5)
    rng.normal(size=3)
    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            7,
            saved,
            data={"row": 4, "epoch": 1},
            host_rng=rng,
            user={"note": "ü"},
            metrics={"eval_loss": 0.5},
        )
    with training.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(make_state(fill=9.0, seed=0))
    assert restored.step == 7
    assert restored.data == {"row": 4, "epoch": 1}
    assert restored.user == {"note": "ü"}
    assert restored.metrics == {"eval_loss": 0.5}
    chex.assert_trees_all_equal(comparable(restored.state), comparable(saved))
    assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
    for new, old in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(saved), strict=True
    ):
        assert type(new) is type(old)
        assert getattr(new, "dtype", None) == getattr(old, "dtype", None)
    again = np.random.default_rng(0)
    again.bit_generator.state = restored.host_rng
    assert again.normal() == rng.normal()


def test_saving_does_not_hold_up_donation(tmp_path):
    state = {"w": jnp.zeros(200_000)}
    step = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)
    with training.Checkpoints(tmp_path) as checkpoints:
        state = step(state)
        checkpoints.save(1, state)
        for _ in range(20):
            state = step(state)
        restored = checkpoints.restore(state)
    assert np.unique(restored.state["w"]).tolist() == [1.0]


def test_restore_onto_another_placement(tmp_path):
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    tree = {"w": jnp.arange(32.0), "n": jnp.int32(3), "key": jax.random.key(1)}
    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        for count in (8, 4, 1):
            mesh = jax.make_mesh(
                (count,),
                ("data",),
                axis_types=(AxisType.Auto,),
                devices=jax.devices()[:count],
            )
            sharding = NamedSharding(mesh, PartitionSpec("data"))
            like = {
                "w": jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding),
                "n": jax.ShapeDtypeStruct((), jnp.int32),
                "key": jax.random.key(0),
            }
            state = checkpoints.restore(like).state
            assert state["w"].sharding.is_equivalent_to(sharding, 1)
            chex.assert_trees_all_equal(comparable(state), comparable(tree))
            # Uncommitted scalars must still combine with arrays of any mesh.
            assert not state["n"].committed
            jax.jit(lambda s: s["w"] * s["n"])(state)


def test_differing_trees_are_named(tmp_path):
    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(1)})
        like = {"a": jnp.zeros(4), "b": jnp.zeros(2, jnp.int32), "d": jnp.zeros(1)}
        with pytest.raises(training.CheckpointError) as caught:
            checkpoints.restore(like)
    message = str(caught.value)
    for line in (
        "a: stored float32[3], asked for float32[4]",
        "b: stored float32[2], asked for int32[2]",
        "c: in the checkpoint, not in the tree asked for",
        "d: not in the checkpoint",
    ):
        assert line in message


def test_nothing_to_restore(tmp_path):
    with training.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None
        with pytest.raises(training.CheckpointError, match="no complete checkpoint;"):
            checkpoints.restore({})
        checkpoints.save(1, {"a": jnp.zeros(1)})
        with pytest.raises(training.CheckpointError, match=r"of step 2; .*\[1\]"):
            checkpoints.restore({"a": jnp.zeros(1)}, step=2)


def test_keeps_the_last_and_the_best(tmp_path):
    losses = {1: 0.9, 2: 0.3, 3: 0.5, 4: float("nan"), 5: 0.4, 6: None}
    with training.Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            metrics = {} if loss is None else {"eval_loss": loss}
            checkpoints.save(step, {"a": jnp.float32(step)}, metrics=metrics)
    with training.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best() == 2
        assert checkpoints.best_metric() == 0.3
        state = {"a": jnp.float32(0)}
        assert checkpoints.restore(state, step=2).state["a"] == 2.0
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        training.Checkpoints(tmp_path, keep_last=0)


def test_a_damaged_checkpoint_is_named(tmp_path):
    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(1000)})
    for file in (tmp_path / "step_00000001" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with (
        training.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(training.CheckpointError, match=r"Cannot read .*step_00000001"),
    ):
        checkpoints.restore({"a": jnp.zeros(1000)})


def start(script, *arguments):
    """A Python process with this folder importable and one device."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    # A limit on file size makes the real writes fail, as a full disk would.
    script = """
        import resource, signal, sys
        import jax.numpy as jnp, numpy as np
        from jaxpost import training

        state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
        checkpoints = training.Checkpoints(sys.argv[1])
        checkpoints.save(1, state)
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoints.save(2, state)
            checkpoints.wait()
        except training.CheckpointError as error:
            print("caught:", error)
        print("left:", checkpoints.steps())
        checkpoints.close()
    """
    process = start(script, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"Saving step 2 to {tmp_path} failed: a file is larger than" in output
    assert "The last good checkpoint is step 1" in output
    assert "left: [1]" in output
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    with training.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"w": jnp.zeros(100_000)}).step == 1


def test_no_space_is_said_in_words(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with training.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(1)})
        checkpoints.wait()
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
        with pytest.raises(training.CheckpointError, match="disk is full: free some"):
            checkpoints.save(2, {"a": jnp.zeros(1)})
        assert checkpoints.latest() == 1


def test_kill_while_saving_leaves_the_last_complete_one(tmp_path):
    script = """
        import sys
        import jax.numpy as jnp, numpy as np
        from jaxpost import training

        # Many arrays that do not compress: saving takes long enough to be hit.
        rng = np.random.default_rng(0)
        state = {str(i): jnp.asarray(rng.normal(size=50_000)) for i in range(60)}
        checkpoints = training.Checkpoints(sys.argv[1], keep_last=3)
        checkpoints.save(1, state)
        checkpoints.wait()
        print("saved", flush=True)
        for step in range(2, 1000):
            checkpoints.save(step, state)
    """
    process = start(script, tmp_path)
    assert process.stdout.readline() == "saved\n"
    deadline = time.monotonic() + 60
    while not any("tmp" in entry.name for entry in tmp_path.iterdir()):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    unfinished = [entry for entry in tmp_path.iterdir() if "tmp" in entry.name]
    assert unfinished, "the save finished before the kill"
    with training.Checkpoints(tmp_path, keep_last=3) as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None
        assert f"step_{latest:08d}" not in unfinished[0].name
        assert not any(entry.exists() for entry in unfinished)
        like = {str(i): jnp.zeros(50_000) for i in range(60)}
        assert checkpoints.restore(like).step == latest


RUN = """
    import json, os, pathlib, signal, sys
    import jax, numpy as np, optax
    import regression
    from jaxpost import training
    from jaxpost.typing import LossOutput, Metric

    class Batches:
        def __init__(self):
            self.row = 0
        def __iter__(self):
            return self
        def __next__(self):
            self.row += 1
            return regression.make_batch(seed=self.row)
        def state(self):
            return {"row": self.row}
        def restore(self, state):
            self.row = state["row"]

    folder, total, kill_at = pathlib.Path(sys.argv[1]), 10, int(sys.argv[2])
    rng = np.random.default_rng(0)

    def loss_fn(params, memory, batch, key):
        output = regression.loss_fn(params, memory, batch, key)
        noise = jax.random.normal(key)
        batch_sum = batch["x"].sum()
        return output._replace(
            terms={k: v._replace(total=v.total * (1 + 0.1 * noise))
                   for k, v in output.terms.items()},
            metrics={"noise": Metric(noise), "data": Metric(batch_sum, kind="sum")},
            method_state=0.5 * memory + batch_sum,
        )

    class Killer:
        def on_log(self, step, metrics):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        def on_eval(self, step, metrics): ...
        def on_end(self, step): ...

    tx, schedule = training.build_optimizer(
        training.OptimizerConfig(learning_rate=0.1, warmup_steps=3, weight_decay=0.1),
        total,
    )
    state = training.init_state(
        regression.make_params(), tx, jax.random.key(1),
        method_state=jax.numpy.float32(0), ema=True,
    )
    step = training.make_train_step(loss_fn, tx, accumulate=2, ema_decay=0.9)

    def place(batch):
        rng_noise = np.float32(rng.normal() * 1e-2)
        return {**batch, "y": batch["y"] + rng_noise}

    run = training.create_run(folder, {"kill_at": kill_at}, resume=True)
    with training.Checkpoints(run.checkpoints) as checkpoints:
        state = training.train(
            step, state, Batches(), total_steps=total, schedule=schedule,
            place=place, save_every=5, checkpoints=checkpoints, resume=True, run=run,
            callbacks=[Killer()], host_rng=rng, progress="none",
        )
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes().hex()
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            state._replace(key=jax.random.key_data(state.key)))
    }
    (folder / "final.json").write_text(json.dumps([leaves, rng.normal()]))
"""


def test_ten_steps_are_five_and_a_kill_and_five_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    processes = [start(RUN, whole, 0), start(RUN, cut, 7)]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert processes[0].returncode == 0, outputs[0]
    assert processes[1].returncode == -signal.SIGKILL, outputs[1]
    assert not (cut / "final.json").exists()
    again = start(RUN, cut, 0)
    output = again.communicate(timeout=180)[0]
    assert again.returncode == 0, output

    assert json.loads((whole / "final.json").read_text()) == json.loads(
        (cut / "final.json").read_text()
    )

    def lines(folder):
        timing = ("tokens/s", "step_time", "compile/seconds")
        text = (folder / "metrics.jsonl").read_text()
        parsed = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in x.items() if k not in timing} for x in parsed]

    assert [line["step"] for line in lines(whole)] == list(range(1, 11))
    assert lines(whole) == lines(cut)
    environment = json.loads((cut / "environment.json").read_text())
    assert len(environment["resumes"]) == 1
