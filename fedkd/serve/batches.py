"""Dynamic batching: images that arrive together are classified in one forward pass."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedkd.serve.images import Refused


class Batches:
    """A queue of images and a task that processes it in batches. Created and used within one event loop.

    ``run`` maps images [N, P, P, 3] to logits [N, C]; it is called in one thread. A batch starts as soon as it has
    ``max_batch`` images, or when its first image has waited for ``max_wait`` seconds. Under load this time has passed
    when the previous batch ends, and the next one starts at once.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], max_batch: int = 64, max_wait: float = 0.002) -> None:
        self.run, self.max_batch, self.max_wait = run, max_batch, max_wait
        self.runs = self.images = 0
        self._waiting: deque[tuple[float, np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self._not_empty, self._full = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "network")
        self._task = asyncio.create_task(self._process())

    async def logits(self, image: np.ndarray) -> np.ndarray:
        """Logits [C] of an image [P, P, 3].

        Raises:
            Refused: the network failed (503).

        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        self._waiting.append((loop.time(), image, future))
        self._not_empty.set()
        if len(self._waiting) >= self.max_batch:
            self._full.set()
        return await future

    async def close(self) -> None:
        """Stop the task. The server calls this after its last response."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def _process(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._not_empty.wait()
            try:
                async with asyncio.timeout_at(self._waiting[0][0] + self.max_wait):
                    await self._full.wait()
            except TimeoutError:
                pass
            first = [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]
            batch = [each for each in first if not each[2].cancelled()]  # their requests had a timeout
            if not self._waiting:
                self._not_empty.clear()
            if len(self._waiting) < self.max_batch:
                self._full.clear()
            if not batch:
                continue
            self.runs, self.images = self.runs + 1, self.images + len(batch)
            stack = np.stack([image for _, image, _ in batch])
            try:
                logits = await loop.run_in_executor(self._thread, self.run, stack)
            except Exception:  # any error of ONNX Runtime, most likely out of memory
                logits = None
            for index, (_, _, future) in enumerate(batch):
                if future.cancelled():
                    continue
                if logits is None:
                    future.set_exception(Refused(503, "The network failed; try again later."))
                else:
                    future.set_result(logits[index])
