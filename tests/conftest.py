"""What every test runs under: one thread, no network, fixed seeds, empty Hub caches, warnings as errors (pyproject)."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HOME"] = _HOME = tempfile.mkdtemp(prefix="lnlm-hf-")  # before anything of Hugging Face is imported
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

from .odd_offsets import OFFSETS, shift_folder  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")

# Third-party warnings that no code of ours can avoid. Everything else is an error.
_NOT_OURS = (
    # torch and its exporter, about their own internals
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    "ignore:.*torch.jit.*is deprecated:DeprecationWarning",
    # the names that every declared version of transformers has, and under which peft asks
    "ignore:`(is_)?gradient_checkpointing.*` is deprecated and will be removed in v6:FutureWarning",
    # DataLoader asks for pinned memory by default and then remarks that there is no accelerator
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
    # multiprocessing forks DataLoader workers while the interpreter has threads (Python 3.12 and later)
    "ignore:This process .* is multi-threaded, use of fork\\(\\) may lead to deadlocks:DeprecationWarning",
)
_OWN_PORTS: set[int] = set()
_bind, _connect, _connect_ex = socket.socket.bind, socket.socket.connect, socket.socket.connect_ex
_getaddrinfo = socket.getaddrinfo


class NetworkUsed(RuntimeError):
    """A test tried to reach something outside its own process."""


def _check(sock: socket.socket, address: object) -> None:
    if sock.family == socket.AF_UNIX:
        return
    host, port = address[:2]  # type: ignore[index]
    if host not in ("127.0.0.1", "::1", "localhost") or port not in _OWN_PORTS:
        raise NetworkUsed(f"tests run offline: no connection to {host}:{port}")


def _recording_bind(self: socket.socket, address: object) -> None:
    _bind(self, address)
    if self.family != socket.AF_UNIX:
        _OWN_PORTS.add(self.getsockname()[1])


def _blocked_connect(self: socket.socket, address: object) -> None:
    _check(self, address)
    return _connect(self, address)


def _blocked_connect_ex(self: socket.socket, address: object) -> int:
    _check(self, address)
    return _connect_ex(self, address)


def _blocked_lookup(host: object, *args: object, **kwargs: object) -> object:
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        raise NetworkUsed(f"tests run offline: no look-up of {host}")
    return _getaddrinfo(host, *args, **kwargs)  # type: ignore[arg-type]


# A process may talk to a server that it opened itself (the Hub stub); nothing else is reachable.
socket.socket.bind = _recording_bind  # type: ignore[method-assign]
socket.socket.connect = _blocked_connect  # type: ignore[method-assign]
socket.socket.connect_ex = _blocked_connect_ex  # type: ignore[method-assign]
socket.getaddrinfo = _blocked_lookup  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    """Register the warnings of third parties."""
    for line in _NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run in one process, not in xdist's, where a debugger wants the terminal: `pytest --pdb`."""
    if config.getoption("usepdb") or config.getoption("trace"):
        config.option.numprocesses = 0


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_settings_after() -> None:
    """Undo process-wide settings that a test may leave behind."""
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _online_to_itself(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub speak HTTP in the modules that bring their own Hub."""
    if "LoopbackHub" in vars(request.module):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(params=[None, *OFFSETS], ids=lambda offset: "as_saved" if offset is None else f"offset_{offset}")
def moved(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Leave a saved folder as it is or let its weights begin at an odd offset: what is loaded must be the same."""
    return lambda folder: None if request.param is None else shift_folder(folder, request.param)
