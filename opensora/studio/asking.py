"""Asks the process that knows torch (`answers`): the first question starts it, and it ends when there are no more."""

import asyncio
import contextlib
import json
import sys
from typing import Any

from opensora.errors import OpenSoraError

IDLE_S = 300.0
"""Without a question for so long, the process is let go of, and its memory with it."""
ANSWER_S = 180.0
_LONGEST = 2**22  # of an answer, in bytes


class Asking:
    """Asks one question after the other; of one event loop."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._ending: asyncio.TimerHandle | None = None

    async def ask(self, name: str, **values: Any) -> Any:
        """The answer to a question, see `answers`.

        Raises:
            OpenSoraError: the question has none, or the process ended over it.
        """
        async with self._turn:
            if self._ending is not None:
                self._ending.cancel()
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._exchange({name: values})
            except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, ValueError):
                await self._kill()
                raise OpenSoraError("nobody could say; the server's log may tell why") from None
            except BaseException:  # a question whose answer nobody waits for
                await self._kill()
                raise
            self._ending = asyncio.get_running_loop().call_later(IDLE_S, self._end)
        if "error" in answer:
            raise OpenSoraError(answer["error"])
        return answer["answer"]

    async def close(self) -> None:
        """Ends the process."""
        if self._ending is not None:
            self._ending.cancel()
        await self._kill()

    async def _exchange(self, question: Any) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "opensora.studio.answers"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST,
                start_new_session=True,  # Ctrl-C is for the process that started the server
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        await self._process.stdin.drain()
        return json.loads(await self._process.stdout.readuntil(b"\n"))

    def _end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
