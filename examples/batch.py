"""Answer a file of requests, one JSON object a line, and go on where it stopped. Start a server with
`python launch.py`, then

python examples/batch.py [--base-url URL] INPUT.jsonl OUTPUT.jsonl

Input and output are as in OpenAI's Batch API: {"custom_id", "url", "body"} gives {"custom_id", "response", "error"}, in
the order in which answers come. Each custom_id is answered exactly once, however often the job is killed and run again.
Needs pip install openai.
"""

import argparse
import asyncio
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from openai import APIConnectionError, APIStatusError, AsyncOpenAI


def read_requests(path: Path) -> dict[str, dict[str, Any]]:
    """By custom_id. Raises ValueError for a line that is none, before anything is asked."""
    requests: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                request = json.loads(line)
                name, _, _ = request["custom_id"], request["url"], request["body"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no request with custom_id, url and body: {error!r}") from error
            if name in requests:
                raise ValueError(f"{path}:{number}: custom_id {name!r} was there before")
            requests[name] = request
    return requests


def read_answered(output: BinaryIO) -> set[str]:
    """The ids in the output file. Half a line, of a job that was killed in the middle of one, is cut off."""
    output.seek(0)
    whole = output.read().rpartition(b"\n")[0]
    output.truncate(len(whole) + 1 if whole else 0)
    output.seek(0, os.SEEK_END)
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


async def answer(client: AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
    """A line of the output. The client itself tries again what is refused for want of room (429, 503)."""
    try:
        body = await client.post(request["url"].removeprefix("/v1"), body=request["body"], cast_to=object)
    except APIStatusError as error:
        if error.status_code >= 500:  # not the request's fault: it stays open for the next run
            raise
        response = {"status_code": error.status_code, "body": error.body}
        return {"custom_id": request["custom_id"], "response": response, "error": {"message": error.message}}
    return {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


async def run(client: AsyncOpenAI, requests: list[dict[str, Any]], output: BinaryIO, concurrency: int) -> int:
    """How many are left open."""
    waiting = iter(requests)
    open_still = 0

    async def work() -> None:
        nonlocal open_still
        for request in waiting:  # all workers take from the same iterator
            try:
                line = await answer(client, request)
            except (APIConnectionError, APIStatusError) as error:
                print(f"{request['custom_id']}: {error}", file=sys.stderr)
                open_still += 1
            else:
                output.write(json.dumps(line).encode() + b"\n")
                output.flush()  # from here on, a kill -9 does not lose it (a power failure may: os.fsync)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return open_still


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time; the engine batches them")
    parser.add_argument("--max-retries", type=int, default=8, help="of a request that found no server, or a full one")
    args = parser.parse_args()
    try:
        requests = read_requests(args.input)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    with os.fdopen(os.open(args.output, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.exit(1, f"another job is writing to {args.output}\n")
        answered = read_answered(output)
        rest = [request for name, request in requests.items() if name not in answered]
        print(f"{len(requests)} requests, {len(requests) - len(rest)} answered before", flush=True)
        client = AsyncOpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=args.max_retries, timeout=3600)
        left = asyncio.run(run(client, rest, output, args.concurrency))
    print(f"{len(rest) - left} answered now, {left} left" + (": run it again" if left else ""))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
