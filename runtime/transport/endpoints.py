"""Addresses of the pipeline's inner sockets: ipc paths in one private directory, each under ZeroMQ's length limit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec


class Endpoints(msgspec.Struct, frozen=True):
    """directory: 0700, random, one per pipeline. api: where clients connect (ipc:// or tcp://).

    epoch: of the rank group. Each group has sockets of its own, so that nothing sent to one reaches the next.
    """

    directory: str
    api: str
    epoch: int = 0

    def of_epoch(self, epoch: int) -> Endpoints:
        return msgspec.structs.replace(self, epoch=epoch)

    @property
    def control(self) -> str:
        """launcher: ROUTER; each child: DEALER with its name as identity."""
        return f"ipc://{self.directory}/control"

    @property
    def tokenizer_manager(self) -> str:
        return f"ipc://{self.directory}/tm"

    @property
    def scheduler(self) -> str:
        """Requests, aborts, queries, stop matches."""
        return f"ipc://{self.directory}/sched"

    @property
    def results(self) -> str:
        """Rank 0's results to the scheduler."""
        return f"ipc://{self.directory}/res"

    @property
    def detokenizer(self) -> str:
        return f"ipc://{self.directory}/detok"

    @property
    def tokenizer_file(self) -> str:
        """A path: tokenizer.json as the tokenizer manager read it, for the detokenizer and the ranks' grammars."""
        return f"{self.directory}/tokenizer.json"

    @property
    def inner_api(self) -> str:
        """`api` for the pipeline's own HTTP server, which starts before port 0 of a tcp:// address is read back."""
        return self.api if self.api.startswith("ipc://") else f"ipc://{self.directory}/api"

    def rank(self, rank: int) -> str:
        return f"ipc://{self.directory}/rank{rank}.{self.epoch}"

    @property
    def rendezvous(self) -> str:
        """The file through which the ranks of one machine meet."""
        return f"{self.directory}/rendezvous.{self.epoch}"

    def rank_files(self, ranks: Iterable[int]) -> list[Path]:
        """What the rank group of this epoch leaves behind when it is killed."""
        return [Path(self.rendezvous), *(Path(self.rank(rank).removeprefix("ipc://")) for rank in ranks)]
