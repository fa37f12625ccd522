"""``python -m fedkd.serve``: classify images over HTTP with an exported network."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedkd.core import cli
from fedkd.core.errors import UsageError
from fedkd.core.values import MAX_PROCESSES

app = cli.new("serve")
NEEDED = ("onnx", "onnxruntime", "PIL", "python_multipart", "starlette", "uvicorn")


def _option(text: str, low: float = 1, high: float | None = None) -> Parameter:
    return Parameter(help=text, validator=Number(gte=low, lte=high))


@app.default
def serve(
    file: Annotated[Path, Parameter(help="An ONNX file that fedkd.export wrote.")],
    /,
    *,
    host: Annotated[
        str, Parameter(help="The address to listen on. Use a reverse proxy if other machines have access.")
    ] = ("127.0.0.1"),
    port: Annotated[int, _option("The port; 0 for any free port.", 0, 65535)] = 8000,
    threads: Annotated[int, _option("Threads of ONNX Runtime.", 1, MAX_PROCESSES)] = 1,
    max_batch: Annotated[int, _option("Maximum number of images in a batch.")] = 64,
    max_wait: Annotated[
        float, _option("Maximum time in milliseconds that an image waits for others.", 0, 10_000)
    ] = 2.0,
    max_bytes: Annotated[
        int, _option("Maximum size of a request in bytes; all that arrive together may have 256 MB.")
    ] = 20_000_000,
    max_pixels: Annotated[
        int, _option("Maximum number of pixels of an image: two are decoded at a time.")
    ] = 25_000_000,
    backlog: Annotated[int, _option("Maximum number of concurrent requests; further ones get status 503.")] = 128,
    timeout: Annotated[float, _option("Seconds for a request to arrive, and then for its response.", 0.1, 3600)] = 20.0,
) -> None:
    """Classify images over HTTP: POST /predict, and a page at / to try it by hand.

    Images get the pixels that they would have had in training. After Ctrl-C or SIGTERM, accepted requests are finished.
    There is no password, no encryption, and no limit for one client: if strangers have access, use a reverse proxy that
    limits connections and requests per address.
    """
    if any(find_spec(name) is None for name in NEEDED):
        raise UsageError("Serving needs libraries that are not installed: pip install 'fedkd[serve]'.")
    from fedkd.serve import http, network, web

    loaded = network.load(file, threads)
    limits = web.Limits(max_bytes, max_pixels, backlog, timeout, max_batch, max_wait)
    with http.listen(host, port) as listening:
        address = f"[{host}]" if ":" in host else host
        print(
            f"{file} is served at http://{address}:{listening.getsockname()[1]}/ "
            f"({loaded.about['classes']} classes, {loaded.pixels} x {loaded.pixels} pixels). Press Ctrl-C to stop.",
            flush=True,
        )
        try:
            http.server(web.app(loaded, limits), timeout).run(sockets=[listening])
        except KeyboardInterrupt:  # the message of cli.run is about rounds
            print("fedkd: interrupted; accepted requests are finished.", file=sys.stderr)
            sys.exit(130)
