"""Compiling while the demo does other things: a second process, on the other core, fills the cache of compiled loops."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from ...flows.output import say
from ...flows.warm_up import command, compiled_families
from ...ops.backend import numba_reason


class CompileAhead:
    """Compiles families' loops, one family after the other, each in a process of its own.

    Args:
        families: model types in the order in which they are needed; those without compiled loops are ready at once.
    """

    def __init__(self, families: Sequence[str]) -> None:
        able = compiled_families() if numba_reason() is None else []
        self._ready = {name: threading.Event() for name in families if name in able}
        self._running: subprocess.Popen[bytes] | None = None
        self._lock, self._over = threading.Lock(), False
        self._thread = threading.Thread(target=self._compile, name="compile ahead", daemon=True)

    def __enter__(self) -> CompileAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over = True
            if self._running is not None:
                self._running.kill()
        self._thread.join()

    def wait(self, family: str) -> None:
        """Return when a family's loops are compiled, or their process has failed and the caller must compile.

        Args:
            family: model type.
        """
        ready = self._ready.get(family)
        if ready is not None and not ready.wait(2.0):
            say(f"{family}: its loops are being compiled; nobody's seconds count meanwhile")
            while not ready.wait(0.2):  # not for ever at once: an interrupt must come through
                pass

    def _compile(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for name, ready in self._ready.items():
            with self._lock:
                if self._over:
                    return
                self._running = subprocess.Popen(
                    command(name, {}), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            _, said = self._running.communicate()
            if self._running.returncode and not self._over:
                last = (said.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                print(f"hf_lnlm: compiling {name} ahead failed: {last}", file=sys.stderr, flush=True)
            ready.set()
