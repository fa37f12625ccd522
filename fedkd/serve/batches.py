"""Images that arrive together are answered by one run of the network."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedkd.serve.images import Refused


class Batches:
    """A queue of images, and one task that answers it. Created and used within one event loop.

    ``run`` gets [N, P, P, 3] and gives [N, C]; it is called in a thread, never twice at once. A run takes up to
    ``largest`` images, and starts when there are as many, or when the first has waited for ``patience`` seconds:
    under load that is past when the run before ends, and nothing waits.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], largest: int = 64, patience: float = 0.002) -> None:
        self.run, self.largest, self.patience = run, largest, patience
        self.runs = self.images = 0
        self._waiting: deque[tuple[float, np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "network")
        self._task = asyncio.create_task(self._answer())

    async def ask(self, image: np.ndarray) -> np.ndarray:
        """Logits [C] of an image [P, P, 3].

        Raises:
            Refused: the run failed (503).

        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        self._waiting.append((loop.time(), image, future))
        self._some.set()
        if len(self._waiting) >= self.largest:
            self._enough.set()
        return await future

    async def close(self) -> None:
        """End the task; all requests have been answered before."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            try:
                async with asyncio.timeout_at(self._waiting[0][0] + self.patience):
                    await self._enough.wait()
            except TimeoutError:
                pass
            batch = [self._waiting.popleft() for _ in range(min(self.largest, len(self._waiting)))]
            if not self._waiting:
                self._some.clear()
            if len(self._waiting) < self.largest:
                self._enough.clear()
            self.runs, self.images = self.runs + 1, self.images + len(batch)
            stack = np.stack([image for _, image, _ in batch])
            try:
                answers = await loop.run_in_executor(self._thread, self.run, stack)
            except Exception:  # whatever ONNX Runtime raises: memory that is short, most likely
                answers = None
            for place, (_, _, future) in enumerate(batch):
                if future.cancelled():
                    continue
                if answers is None:
                    future.set_exception(Refused(503, "The network could not be run; try again later."))
                else:
                    future.set_result(answers[place])
