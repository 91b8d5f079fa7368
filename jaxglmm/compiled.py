"""Compiled programs of the people's door, kept in the process and on disk.

A program is asked for by a function, its static arguments, the shapes of its arguments
and its devices. It is looked for in this process, then in the cache folder, then
compiled and written there, so that a second process neither traces nor compiles. A
process keeps the programs used last: each takes hundreds of memory maps, of which the
system allows a process some ten thousands, and ends it beyond. Of
JAX's own configuration the default device is heeded, and nothing is changed; where the
user has configured JAX's persistent cache, that one is left to do the work and nothing
is written here.

Environment
-----------
JAXGLMM_CACHE_DIR
    Folder to use instead of the user's cache folder.
JAXGLMM_CACHE
    ``0`` or ``off``: nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pickle
import platform
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxglmm

__all__ = ["cache_dir", "clear_cache", "run"]

_MAX_BYTES = 300_000_000
_QUICK = ("xla_cpu_use_fusion_emitters", False)
_PLAIN = ("xla_cpu_experimental_ynn_fusion_type", "")
_ALONE = ("xla_cpu_multi_thread_eigen", False)
_MANY = 20_000  # numbers in the arguments, from which the code's speed counts more
_MOST_PROGRAMS = 64  # of up to a thousand memory maps each; Linux allows 65,530
_programs: OrderedDict[Any, Any] = OrderedDict()  # the one used last comes last
_table = threading.Lock()
_compiling = threading.RLock()  # a user's function may fit while it is traced


def run(
    fn: Callable,
    static: tuple,
    *args,
    keep: bool = True,
    lanes: str | None = None,
    devices: tuple[Any, ...] = (),
) -> Any:
    """Call ``fn(*static, *args)`` compiled in float64; NumPy arrays in and out.

    Parameters
    ----------
    fn : callable
        A module-level function; ``static`` its leading, hashable arguments.
    static : tuple
        Must have a repr that says all about it, if it is to be kept on disk.
    *args : pytrees of NumPy arrays
    keep : bool
        Whether the program may be kept on disk.
    lanes : {"elementwise", "scattered"}, optional
        Of a program that maps a fit over lanes: without scattered sums over rows in
        its loops, or with them.
    devices : tuple of jax.Device, optional
        Where to run: one, or all those that ``fn`` spreads its work over. By default
        the device that JAX would choose.

    Returns
    -------
    pytree of NumPy arrays
    """
    leaves, treedef = jax.tree.flatten(args)
    shapes = tuple((np.shape(x), np.result_type(x).str) for x in leaves)
    devices = devices or (_default_device(),)
    key = (fn, static, treedef, shapes, lanes, devices)
    program = _kept(key)
    with jax.enable_x64(True), jax.default_device(devices[0]):
        if program is None:
            with _compiling:  # threads that want the same program wait for it
                program = _kept(key)
                if program is None:
                    program = _get(
                        fn, static, args, treedef, shapes, keep, lanes, devices
                    )
                    _keep(key, program)
        return jax.tree.map(np.asarray, program(*args))


def _kept(key: tuple) -> Any:
    """The program, used last from now on; None where it is not in the process."""
    with _table:
        program = _programs.get(key)
        if program is not None:
            _programs.move_to_end(key)
        return program


def _keep(key: tuple, program: Any) -> None:
    with _table:
        _programs[key] = program
        while len(_programs) > _MOST_PROGRAMS:
            _programs.popitem(last=False)


def _default_device() -> Any:
    """The one that JAX would choose; a user names it, or its platform."""
    given = getattr(jax.config, "jax_default_device", None)
    if given is None or isinstance(given, str):
        return jax.local_devices(backend=given)[0]
    return given


def _get(fn, static, args, treedef, shapes, keep, lanes, devices):
    path = _path(fn, static, treedef, shapes, devices) if keep else None
    program = _load(path, devices) if path else None
    if program is None:
        lowered = jax.jit(functools.partial(fn, *static)).lower(*args)
        size = sum(np.size(x) for x in jax.tree.leaves(args))
        on_cpu = devices[0].platform == "cpu"
        program = lowered.compile(_options(size < _MANY, lanes) if on_cpu else None)
        _return_memory()
        if path:
            _store(path, program)
    return program


def _options(short: bool, lanes: str | None) -> dict[str, str | bool]:
    """Compiler options that suit short arrays, or lanes of a kind of work, on a CPU.

    XLA's older way of generating CPU code takes half to two thirds of the time to
    compile; what it makes is as fast on short arrays, and a third slower on long ones.
    For lanes it makes faster code of elementwise work, and of scattered sums a loop
    that is slower. XLA hands many small sums to a library for large ones, which takes
    lanes two to three times as long. Their threads have tiles of their own, so none of
    their operations is split between threads, which costs up to a third.
    """
    if lanes is None:
        wanted = [_QUICK] if short else []
    else:
        wanted = [_PLAIN, _ALONE]
        if lanes == "elementwise":
            wanted.append(_QUICK)
    return dict(option for option in wanted if _is_known(*option))


@functools.cache
def _is_known(name: str, value: str | bool) -> bool:
    """Whether an option can be set here and is not set by the user."""
    if name in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.jit(jnp.negative).lower(1.0).compile({name: value})
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return False
    return True


def _return_memory() -> None:
    """Give what the compiler freed back to the system, where the C library can."""
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def cache_dir() -> Path | None:
    """Folder that compiled programs are kept in; None where that is switched off."""
    if os.environ.get("JAXGLMM_CACHE", "").lower() in ("0", "off", "false", "no"):
        return None
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    given = os.environ.get("JAXGLMM_CACHE_DIR")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxglmm")) / "compiled"


def clear_cache() -> int:
    """Delete the programs kept on disk; returns how many there were."""
    folder = cache_dir()
    files = list(folder.glob("*.xla")) if folder and folder.is_dir() else []
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


@functools.cache
def _machine(device) -> str:
    """Everything besides the program that decides whether compiled code is valid."""
    flags = ""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    package = Path(jaxglmm.__file__).parent
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.read_bytes())
    parts = [
        jax.__version__, metadata.version("jaxlib"), sys.version, platform.machine(),
        device.platform, device.device_kind, device.client.platform_version,
        str(len(jax.devices(device.platform))), flags,
        os.environ.get("XLA_FLAGS", ""), str(os.cpu_count()), source.hexdigest(),
    ]  # fmt: skip
    return "\n".join(parts)


def _path(fn, static, treedef, shapes, devices) -> Path | None:
    folder = cache_dir()
    if folder is None:
        return None
    parts = [
        _machine(devices[0]), repr(devices), fn.__module__, fn.__qualname__,
        repr(static), str(treedef), *map(repr, shapes),
    ]  # fmt: skip
    text = "\n".join(parts)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.xla"


def _load(path: Path, devices: tuple):
    from jax.experimental.serialize_executable import deserialize_and_load

    try:
        payload = path.read_bytes()
    except OSError:
        return None
    try:
        return deserialize_and_load(
            *pickle.loads(payload), backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # a damaged or foreign file: compile anew and write it again
        return None


def _store(path: Path, program) -> None:
    from jax.experimental.serialize_executable import serialize

    try:
        payload = pickle.dumps(serialize(program))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(payload)
        os.replace(file.name, path)
        _prune(path.parent)
    except Exception:  # unwritable folder, program that cannot be written: only time
        return


def _prune(folder: Path) -> None:
    """Keep the folder small: the oldest programs go first."""
    files = sorted(folder.glob("*.xla"), key=lambda f: f.stat().st_mtime)
    total = sum(f.stat().st_size for f in files)
    for file in files:
        if total <= _MAX_BYTES:
            return
        total -= file.stat().st_size
        file.unlink(missing_ok=True)
