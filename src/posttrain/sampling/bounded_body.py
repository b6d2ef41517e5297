"""Bodies of HTTP answers, held to a size that is counted after they are unpacked."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import AsyncIterator
from typing import Any

LARGEST_BODY = 8 * 2**20
"""Most bytes of an answer, unpacked: a completion with the probabilities that are asked for is below a hundredth."""


class Broken(Exception):
    """Report an answer that can't be used: no JSON, cut off, too large, or something else in it."""


class Redirected(Exception):
    """Report a redirect: its status and the address that it names."""

    def __init__(self, status: int, location: str) -> None:
        super().__init__(status, location)
        self.status, self.location = status, location


class BoundedBody:
    """Iterate over the bytes of an answer, unpacked, and stop where they are too many.

    httpx unpacks a whole chunk before it hands it on, and a few kilobytes may stand for gigabytes. Here no more is
    unpacked than the limit.
    """

    def __init__(self, stream: Any, encoding: str) -> None:
        self.stream, self.encoding = stream, encoding.strip().lower()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Broken(f"the answer is packed as {self.encoding[:40]!r}, which was not asked for")
        unpack = zlib.decompressobj(wbits=47) if self.encoding not in ("", "identity") else None  # gzip or zlib
        total = 0
        async for chunk in self.stream:
            while chunk:
                try:
                    part = chunk if unpack is None else unpack.decompress(chunk, LARGEST_BODY - total + 1)
                except zlib.error as error:
                    raise Broken(f"the answer can't be unpacked: {error}") from error
                total += len(part)
                if total > LARGEST_BODY:
                    raise Broken(f"the answer is larger than {LARGEST_BODY // 2**20} MiB")
                chunk = b"" if unpack is None else unpack.unconsumed_tail
                if part:
                    yield part

    async def aclose(self) -> None:
        """Close the connection's stream."""
        await self.stream.aclose()


async def limit_answer(response: Any) -> None:
    """Refuse a redirect and bound the body of a response that is about to be read: a hook of httpx's clients.

    Raises:
        Redirected: The answer is a redirect. It would hand the questions to another address, whose answers would count.
    """
    if 300 <= response.status_code < 400:
        raise Redirected(response.status_code, str(response.headers.get("location", "nowhere")))
    package = importlib.import_module(type(response).__module__.partition(".")[0])  # httpx, or what openai has of it
    bounded = type("Bounded", (BoundedBody, package.AsyncByteStream), {})
    response.stream = bounded(response.stream, response.headers.pop("content-encoding", ""))
