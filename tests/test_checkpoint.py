"""Studies that were stopped go on; folders that cannot be used are named."""

import ast
import functools
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import jaxglmm as jg
from jaxglmm.errors import CheckpointError
from jaxglmm.studies import checkpoint as checkpoint_module
from jaxglmm.studies.identity import described


@pytest.fixture(scope="module")
def dyestuff():
    return jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())


def _checkpointed(m, folder, **changes):
    options = {"n_sims": 600, "tile": 16, "threads": 1, **changes}
    key = options.pop("key", 9)
    return jg.recovery_study(
        key, m.design, m.fit.params, checkpoint=folder, progress=False, **options
    )


def _bits(study):
    return {k: v.tobytes() for k, v in study.records["REML"].items()}


def test_a_stopped_study_goes_on_and_ends_the_same(dyestuff, tmp_path, monkeypatch):
    whole = _checkpointed(dyestuff, tmp_path / "whole")
    write, written = checkpoint_module._write, []

    def stop(path, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            _checkpointed(dyestuff, tmp_path / "cut")
    files = sorted((tmp_path / "cut" / "REML").iterdir())
    assert [f.name for f in files] == [
        "chunk-000000.parquet", "chunk-000001.parquet", "study.json",
    ]  # fmt: skip
    before = [f.stat().st_mtime_ns for f in files]
    again = _checkpointed(dyestuff, tmp_path / "cut")
    assert [f.stat().st_mtime_ns for f in files] == before  # read, not made again
    assert _bits(again) == _bits(whole)


def test_a_changed_study_is_refused_by_name(dyestuff, tmp_path):
    _checkpointed(dyestuff, tmp_path, n_sims=32)
    with pytest.raises(CheckpointError, match="replicates was 32, now 48"):
        _checkpointed(dyestuff, tmp_path, n_sims=48)
    with pytest.raises(CheckpointError, match="differs from this one in key was #"):
        _checkpointed(dyestuff, tmp_path, n_sims=32, key=10)
    with pytest.raises(CheckpointError, match=r"control was .*max_iter=None.*now.*=9"):
        _checkpointed(dyestuff, tmp_path, n_sims=32, control=jg.Control(max_iter=9))
    changed = dyestuff.design.replace(X=2.0 * dyestuff.design.X)
    with pytest.raises(CheckpointError, match="differs from this one in X was #"):
        jg.recovery_study(
            9, changed, dyestuff.fit.params, n_sims=32, tile=16, threads=1,
            checkpoint=tmp_path, progress=False,
        )  # fmt: skip


def test_a_folder_that_cannot_be_used(dyestuff, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used: Not a directory"):
        _checkpointed(dyestuff, tmp_path / "file")
    write, written = checkpoint_module._write, []

    def full(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            _checkpointed(dyestuff, tmp_path / "full")
    folder = tmp_path / "full" / "REML"
    assert (folder / "chunk-000000.parquet").exists()
    _checkpointed(dyestuff, tmp_path / "full")
    (folder / "chunk-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="is damaged"):
        _checkpointed(dyestuff, tmp_path / "full")


def _leaves(fits):
    return [(x.dtype, x.shape, x.tobytes()) for x in jax.tree.leaves(fits)]


def test_a_stopped_batch_goes_on_and_ends_the_same(dyestuff, tmp_path, monkeypatch):
    ys = np.random.default_rng(1).normal(1500.0, 60.0, (400, 30))

    def batch(folder, ys=ys, **options):
        options = {"tile": 16, "threads": 1, "checkpoint": folder, **options}
        return jg.fit_batch(dyestuff.design, ys, progress=False, **options)

    plain = batch(None)
    whole = batch(tmp_path / "whole")
    save, saved = checkpoint_module.Checkpoint.save, []

    def stop(self, index, chunk):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(index)
        save(self, index, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            batch(tmp_path / "cut")
    files = sorted((tmp_path / "cut").iterdir())
    assert [f.name for f in files] == ["chunk-000000.parquet", "study.json"]
    before = files[0].stat().st_mtime_ns
    resumed = batch(tmp_path / "cut")
    assert files[0].stat().st_mtime_ns == before
    read = batch(tmp_path / "cut")  # nothing left to compute
    assert jax.tree.structure(read) == jax.tree.structure(plain)
    for other in (whole, resumed, read):
        assert _leaves(other) == _leaves(plain)
    changed = ys.copy()
    changed[399, 29] += 1e-9
    for options, name in (
        ({"ys": changed}, "y was #"),
        ({"effects": False}, "effects was True, now False"),
        ({"start": np.ones(1)}, "start was "),
        ({"method": "ML"}, "method was 'REML', now 'ML'"),
        ({"ys": ys[:399]}, "replicates was 400, now 399"),
    ):
        with pytest.raises(CheckpointError, match=name):
            batch(tmp_path / "cut", **options)


def test_a_batch_of_designs_has_a_checkpoint_too(tmp_path):
    rng = np.random.default_rng(5)
    designs = []
    for J in (6, 9, 7):
        g = np.repeat(np.arange(J), 4)
        term = jg.Term(np.ones((len(g), 1)), g)
        designs.append(jg.Design(rng.normal(size=4 * J), term.z, (term,)))
    first = jg.fit_batch(designs, checkpoint=tmp_path, progress=False)
    again = jg.fit_batch(designs, checkpoint=tmp_path, progress=False)
    assert _leaves(first) == _leaves(again)
    designs[2] = designs[2].replace(y=-designs[2].y)
    with pytest.raises(CheckpointError, match="differs from this one in y was #"):
        jg.fit_batch(designs, checkpoint=tmp_path, progress=False)


FULL = """
import sys
from pathlib import Path
import numpy as np, jax, jaxglmm as jg
folder = Path(sys.argv[1])
with jax.enable_x64(True):
    design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    params = jax.tree.map(np.asarray, jg.fit(design).params)

def study(at):
    return jg.recovery_study(
        9, design, params, n_sims=1200, tile=16, threads=1, checkpoint=at,
        progress=False,
    )

def chunks():
    return {p.name: p.read_bytes() for p in (folder / "REML").glob("chunk-*")}

large = folder / "other"
large.write_bytes(bytes(980_000))  # of 1 MB
try:
    study(folder)
except jg.CheckpointError as error:
    message = str(error)
kept = chunks()
large.unlink()
again, whole = study(folder), study(sys.argv[2])
same = [
    again.records["REML"][k].tobytes() == v.tobytes()
    for k, v in whole.records["REML"].items()
]
untouched = all(chunks()[k] == v for k, v in kept.items())
left = [p.name for p in (folder / "REML").iterdir()]
print([message, len(kept), len(chunks()), untouched, same, left])
"""


def _small_disk(folder):
    """A command line that has 1 MB of disk at the folder, or None."""
    mount = f'mount -t tmpfs -o size=1m tmpfs "{folder}" && exec "$@"'
    for prefix in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*prefix, "sh", "-c", mount, "sh"]
        if shutil.which("unshare"):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
    return None


def test_a_full_disk(tmp_path):
    """On a real one, which has room for some chunks."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = _small_disk(disk)
    if command is None:
        pytest.skip("no right to mount a small file system, not even in a namespace")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL, str(disk), str(tmp_path / "whole")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    message, kept, chunks, untouched, same, left = ast.literal_eval(done.stdout)
    assert f"could not be written to {disk}/REML: No space left on device" in message
    assert f"The {kept} chunks finished before are kept" in message
    assert 0 < kept < chunks == 6
    assert untouched
    assert same
    assert all(same)
    assert len(left) == chunks + 1  # and study.json


KILLED = """
import sys, jaxglmm as jg
m = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
print("ready", flush=True)
s = jg.recovery_study(
    9, m.design, m.fit.params, n_sims=20000, tile=64, threads=2,
    checkpoint=sys.argv[1], progress=False,
)
print("done", flush=True)
"""


def _killed_study(folder, seconds):
    """Start a study and kill it some seconds after it began; whether it was done."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(seconds)
        if seconds:
            process.send_signal(signal.SIGKILL)
        return process.stdout.read() == "done\n"


def _table(folder):
    files = sorted((folder / "REML").glob("chunk-*.parquet"))
    return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    start = time.monotonic()
    assert _killed_study(tmp_path / "whole", 0)
    took = time.monotonic() - start
    for seconds in np.random.default_rng(1).uniform(0.1, took / 4, 10):
        _killed_study(tmp_path / "cut", seconds)
    assert _killed_study(tmp_path / "cut", 0)
    whole, cut = _table(tmp_path / "whole"), _table(tmp_path / "cut")
    assert len(whole) == 20000
    pd.testing.assert_frame_equal(whole, cut, check_exact=True)
    assert not list((tmp_path / "cut" / "REML").glob("*.tmp"))


def test_functions_are_told_apart_by_what_they_do():
    def scaled(s):
        table = jnp.arange(3.0) * s

        @jax.jit
        def total(p):
            return -sum(v * s for v in p) + table.sum()

        def again(n):  # holds itself
            return again(n - 1) if n else total

        return again

    same, other = described(scaled(1.0)), described(scaled(2.0))
    assert same == described(scaled(1.0))
    assert same != other
    # the same code and constants, another name
    total, largest = (lambda p: -p.theta.sum()), (lambda p: -p.theta.max())
    assert described(total) != described(largest)
    assert described(functools.partial(scaled, 1.0)) != described(scaled)


DESCRIBED = """
import jaxglmm as jg, optax
from jaxglmm.studies.identity import described
family = jg.Family(log_density=lambda y, eta, psi: -abs(y - eta), name="absolute")
schedule = optax.cosine_decay_schedule(0.1, 100)
optimizer = optax.chain(optax.clip(1.0), optax.adam(schedule))
print(described(family), described(jg.Control(optimizer=optimizer)))
"""


def test_what_a_function_finds_in_its_module_counts(monkeypatch):
    def both():
        return described(_scaled), described(jax.jit(_scaled))

    before = both()
    assert before == both()
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert all(a != b for a, b in zip(before, both()))
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "_helper", lambda x: x + 1)
    assert all(a != b for a, b in zip(before, both()))


def test_classes_and_tables_count_by_what_they_hold():
    def scaled(by):
        class Scaled:
            factor = by

            def __call__(self, fit):
                return fit.params.sigma * self.factor

        return Scaled()

    assert described(scaled(2.0)) == described(scaled(2.0))
    assert described(scaled(2.0)) != described(scaled(3.0))
    table = pd.DataFrame({"a": np.arange(200.0), "f": ["u", "v"] * 100})
    held = [
        table, table["f"], table["f"].astype("category").cat.categories,
        table["f"].to_numpy(object), jax.random.key(3), {described: 1}, "<f at 0x7f>",
    ]  # fmt: skip
    before = [described(lambda fit, x=x: x) for x in held]
    assert len(set(before)) == len(held)
    assert before == [described(lambda fit, x=x: x) for x in held]
    table.loc[117, "a"] = 0.5
    assert described(lambda fit, x=table: x) != before[0]


def test_a_chain_that_is_too_long_is_said():
    def fn(fit):
        return 0.0

    for _ in range(2000):
        fn = functools.partial(lambda fit, of: of(fit), of=fn)
    with pytest.raises(CheckpointError, match="calls functions in too long a chain"):
        described(fn)


SCALE = 2.0


def _helper(x):
    return x


def _scaled(fit):
    return jnp.abs(_helper(fit.params.sigma)) * SCALE


def test_damage_to_a_chunk_is_noticed(dyestuff, tmp_path):
    _checkpointed(dyestuff, tmp_path, n_sims=32)
    chunk = tmp_path / "REML" / "chunk-000001.parquet"
    whole, bits = (
        chunk.read_bytes(),
        _bits(_checkpointed(dyestuff, tmp_path, n_sims=32)),
    )
    noticed = 0
    for at in range(50, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        chunk.write_bytes(bytes(flipped))
        try:  # some bytes of a Parquet file say nothing
            assert _bits(_checkpointed(dyestuff, tmp_path, n_sims=32)) == bits
        except CheckpointError as error:
            noticed += "is damaged" in str(error)
    assert noticed > 10
    chunk.write_bytes(whole)
    manifest = tmp_path / "REML" / "study.json"
    for content in (b"[]", b"{", b"\xff\xfe"):
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"study\.json is damaged"):
            _checkpointed(dyestuff, tmp_path, n_sims=32)
    manifest.unlink()  # chunks know their study without it
    with pytest.raises(CheckpointError, match="belongs to another study, or"):
        _checkpointed(dyestuff, tmp_path, n_sims=32, key=10)
    _checkpointed(dyestuff, tmp_path / "long")
    one, other = (
        tmp_path / "long" / "REML" / f"chunk-00000{i}.parquet" for i in (1, 2)
    )
    shutil.copy(one, other)
    with pytest.raises(CheckpointError, match="elsewhere in this one"):
        _checkpointed(dyestuff, tmp_path / "long")
    with pytest.raises(TypeError, match="checkpoint must be a folder's path; found 5"):
        _checkpointed(dyestuff, 5, n_sims=32)


def test_another_process_says_the_same_of_objects():
    said = set()
    for seed in "01":
        done = subprocess.run(
            [sys.executable, "-c", DESCRIBED], capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        said.add(done.stdout)
    assert len(said) == 1
    assert "0x" not in said.pop()
    one, other = (jg.Control(optimizer=optax.sgd(rate)) for rate in (0.1, 0.2))
    assert described(one) != described(other)
