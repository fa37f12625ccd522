"""Flower's simulation runtime: clients run in Ray's actors, on this machine or on a cluster.

The run takes place in a child process that leads its own session. So whatever happens (Flower's threads hang after
Ctrl-C, Ray's helpers outlive a killed driver by a minute), the whole group ends with the command that was started.
In the child the server runs in the main thread, where signals arrive, and Flower's runtime in another thread.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from _thread import interrupt_main
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NoReturn

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedkd.core import run_directory
from fedkd.core.config import Config
from fedkd.core.errors import FedkdError, RunError, StorageError, UsageError
from fedkd.simulate.flower import client_app
from fedkd.simulate.flower.local_update import ClientRunner, failure
from fedkd.simulate.flower.server_app import run_on

GRACE = 5.0  # seconds the child gets to write what it has after Ctrl-C


class ConfiguredClientApp(ClientApp):
    """The client app with the run's config, which Flower's runtime gives only to the server.

    With checkpoints, client memories are files in the run directory, as on the local grid.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._run_config: UserConfig = dict(config.run_config())
        self._memories = Path(config.out).resolve() / "checkpoint" if config.checkpoint_every else None

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's reply. An exception becomes a reply too, as everywhere in fedkd, and not a page of Ray's log."""
        if self._memories is not None:
            return self._with_files(self._memories, message, int(context.node_config["partition-id"]))
        theirs, context.run_config = context.run_config, dict(self._run_config)
        try:
            return client_app.app(message, context)
        except (Exception, SystemExit):
            return failure(message, traceback.format_exc())
        finally:
            context.run_config = theirs

    def _with_files(self, memories: Path, message: Message, client: int) -> Message:
        if not memories.parent.exists():
            reason = (
                f"{memories.parent} does not exist on {platform.node()}: --out must be a directory that all machines "
                "of the cluster share, or add --checkpoint-every 0."
            )
            return failure(message, reason)
        try:
            clients = int(self._run_config["clients"])
            return ClientRunner(client_app.app, clients, self._run_config, memories, durable=True).run(message, client)
        except StorageError as error:
            return failure(message, str(error))


def run(config: Config) -> None:
    """Run the child, pass on its output, and leave no process behind.

    Raises:
        FedkdError: what ended the run, with its exit code.

    """
    out = Path(config.out)
    command = [sys.executable, "-m", __name__, str(out), json.dumps(config.run_config())]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but its process id is not reused yet
    except BaseException:  # Ctrl-C, or asked to terminate
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    if code:
        if code == StorageError.code:
            raise run_directory.read_failure(out) or StorageError(
                f"A file could not be written; see {out / 'ray.log'}."
            )
        raise run_directory.read_failure(out) or RunError(
            f"Flower's simulation ended with {code}; its log is {out / 'ray.log'}."
        )


def main() -> NoReturn:
    """``python -m fedkd.simulate.flower.ray_engine OUT CONFIG``: the child; the config is JSON."""
    out, config = Path(sys.argv[1]), Config.parse(json.loads(sys.argv[2]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _keep_screen_clean(out / "ray.log", screen=2 if config.json else 1)
    code = 0
    try:
        _run(dataclasses.replace(config, json=True))  # everything shown on the screen goes to standard error
    except FedkdError as error:
        run_directory.record_failure(out, error)
        code = error.code
    except OSError as error:
        with suppress(OSError):
            run_directory.record_failure(out, StorageError.of(error))
        code = StorageError.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Flower's threads are not waited for


def _run(config: Config) -> None:
    _connect(config)
    handed: Queue[Grid] = Queue()
    over = threading.Event()
    server = ServerApp()

    @server.main()
    def hand_over(grid: Grid, context: Context) -> None:
        handed.put(grid)
        over.wait()

    broken: list[BaseException] = []
    runtime = threading.Thread(target=_simulate, args=(server, config, over, broken), daemon=True)
    runtime.start()
    try:
        while True:
            with suppress(Empty):
                grid = handed.get(timeout=1)  # not forever: a signal has to be noticed
                break
        run_on(grid, config)
    except KeyboardInterrupt:
        if broken:
            raise RunError(f"Flower's simulation runtime ended: {broken[0]}.") from broken[0]
        raise
    finally:
        over.set()


def _connect(config: Config) -> None:
    """Start Ray here, or join a cluster."""
    import ray

    address = config.ray_address or "local"
    host, _, port = address.removeprefix("ray://").partition(":")
    if ":" in address and not port.isdigit():
        raise UsageError(f"--ray-address {address} is not HOST:PORT.")
    if port:  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"--ray-address {address} cannot be reached: {error}.") from error
    ours = {key: value for key, value in os.environ.items() if key.startswith("FEDKD_")}
    try:
        ray.init(
            address=address,
            include_dashboard=None if port or address == "auto" else False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {**ours, "PYTHONPATH": os.pathsep.join(sys.path)}},
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if address == "auto" and isinstance(error, ConnectionError):
            raise UsageError("--ray-address auto: no Ray runs here; start it by ray start --head.") from error
        raise UsageError(f"--ray-address {address} cannot be used: {str(error).splitlines()[0]}") from error
    found = ray.cluster_resources()
    for kind, wanted in (("CPU", config.client_cpus), ("GPU", config.client_gpus)):
        if wanted > found.get(kind, 0):
            raise UsageError(f"--client-{kind.lower()}s {wanted:g}: Ray has {found.get(kind, 0):g} of them.")


def _simulate(server: ServerApp, config: Config, over: threading.Event, broken: list[BaseException]) -> None:
    """Flower's runtime; if it ends too early, the main thread is interrupted."""
    from flwr.simulation import run_simulation

    # Ray replaces a process that dies and repeats its task once; Flower does neither.
    resources: dict[str, Any] = {
        "num_cpus": config.client_cpus,
        "num_gpus": config.client_gpus,
        "max_restarts": -1,
        "max_task_retries": 1,
    }
    try:
        run_simulation(
            server,
            ConfiguredClientApp(config),
            config.clients,
            backend_config={"client_resources": resources},
        )
    except BaseException as error:
        broken.append(error)
    if not over.is_set():
        interrupt_main()


def _keep_screen_clean(log: Path, screen: int) -> None:
    """Output of Flower and Ray goes to a log; standard error becomes the screen, the descriptor ``screen``."""
    shown, file = os.fdopen(os.dup(screen), "w", buffering=1), log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = file, shown
    for handler in logging.getLogger("flwr").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(file)


def _end_with(parent: int) -> None:
    """Kill this session's processes, this one too, when the command that was started has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
