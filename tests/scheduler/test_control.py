"""The protocol of pauses, new weights and sleep, with stand-ins for ranks, launcher and clients: who is told what and
when, and which weights are in force whatever dies when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.qwen3.harness import DENSE, make_checkpoint
from tests.scheduler.harness import Harness, config, request
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import (
    ErrorInfo,
    LoadWeights,
    Message,
    RankDone,
    RankReady,
    SchedulerQuery,
    SchedulerReply,
    SleepRank,
    WakeRank,
    Weights,
)
from vibe_sgl_lite.runtime.settings.checkpoint import settle
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints
from vibe_sgl_lite.scheduler.control import Control

START = Weights("/start", "default")


class World:
    """Lines that remember what went over them, and a scheduler that is driven by hand."""

    def __init__(self, folder: Path, **args: Any) -> None:
        self.folder = str(folder)
        self.harness = Harness(config(num_pages=100))
        spec = PipelineSpec(
            args=ServerArgs(**args), endpoints=Endpoints("/d", "ipc:///a"),
            model=settle(ModelConfig.from_folder(folder), folder), model_name="m", model_folder="/start",
            tokenizer_folder="/start", context_length=64, chunked_prefill_size=16, page_size=4, device="cpu",
            dtype="float32", epoch="e",
        )  # fmt: skip
        self.ranks: list[Message] = []
        self.kept: list[Weights] = []
        self.replies: dict[int, SchedulerReply] = {}
        self.versions: list[str] = []
        self.control = Control(self.harness.scheduler, spec, START, self)
        self._qid = 0

    def to_ranks(self, message: Message) -> None:
        self.ranks.append(message)

    def to_launcher(self, weights: Weights) -> None:
        self.kept.append(weights)

    def reply(self, reply: SchedulerReply) -> None:
        assert reply.qid not in self.replies
        self.replies[reply.qid] = reply

    def new_weights(self, version: str) -> None:
        self.versions.append(version)

    def ask(self, what: Any, **args: str | int | bool | None) -> int:
        self._qid += 1
        self.harness._take(self.control.take(SchedulerQuery(self._qid, what, args), 0.0))
        self.turn()
        return self._qid

    def update(self, version: str | None = None, **args: str | int | bool | None) -> int:
        return self.ask("update_weights", path=self.folder, weight_version=version, **args)

    def turn(self) -> None:
        self.harness._take(self.control.advance(0.0))

    def run(self) -> None:
        """Steps as far as they go."""
        while self.harness.step():
            self.turn()
        self.turn()

    def done(self, error: ErrorInfo | None = None) -> None:
        self.control.on_done(RankDone(error), 0.0)
        self.turn()

    def ranks_are_back(self, weights: Weights) -> bool:
        ready = self.control.on_ready(RankReady(100, "cpu", "float32", self.harness.rank.epoch, weights=weights), 0.0)
        if ready:
            self.harness.ranks_ready()
        self.turn()
        return ready

    @property
    def version(self) -> object:
        assert self.harness.scheduler.stats()["weight_version"] == self.control.weights.version
        return self.control.weights.version

    @property
    def paused(self) -> object:
        return self.harness.scheduler.stats()["paused"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, DENSE)
    return path


@pytest.fixture
def world(folder: Path) -> World:
    return World(folder)


def code(reply: SchedulerReply) -> str | None:
    return None if reply.error is None else reply.error.code


def test_running_requests_end_first_and_others_wait(world: World) -> None:
    world.harness.add(request(0, [1] * 5, max_new_tokens=5))
    world.harness.step()
    asked = world.update("v1")
    world.harness.add(request(1, [2] * 5, max_new_tokens=5))
    assert not world.ranks
    world.run()
    assert world.harness.samples[0].finish is not None
    assert not world.harness.samples[1].tokens
    new = Weights(world.folder, "v1", 1)
    assert world.ranks == [LoadWeights(new, START)]
    world.run()
    assert not world.harness.schedule(), "a step while the ranks load"
    world.done()
    assert world.kept == [new]
    assert (world.version, world.versions, world.replies) == ("default", [], {})
    world.control.on_kept(1, 0.0)
    assert (world.version, world.versions) == ("v1", ["v1"])
    assert world.replies[asked].values["weight_version"] == "v1"
    world.run()
    assert world.harness.samples[1].finish is not None


def test_one_after_another_under_one_pause(world: World) -> None:
    first, second = world.ask("pause", mode="abort"), world.ask("pause", mode="keep")
    assert world.replies.keys() == {first, second}
    a, b, back = world.update("a"), world.update("b"), world.ask("continue")
    assert len(world.ranks) == 1
    world.done()
    world.control.on_kept(1, 0.0)
    world.turn()
    assert world.replies.keys() == {first, second, a}
    world.done()
    world.control.on_kept(2, 0.0)
    world.turn()
    assert world.replies.keys() == {first, second, a, b, back}
    assert (world.version, world.paused) == ("b", False)
    assert world.ranks[1] == LoadWeights(Weights(world.folder, "b", 2), Weights(world.folder, "a", 1))


def test_a_pause_may_hurry_an_update_that_waits(world: World) -> None:
    world.harness.add(request(0, [1] * 5, max_new_tokens=50))
    world.harness.step()
    asked = world.update()
    world.harness.step()
    paused = world.ask("pause", mode="abort")
    while world.harness.step():
        pass
    world.turn()
    assert world.harness.samples[0].finish is not None
    assert world.harness.samples[0].finish.reason == "abort"
    assert paused in world.replies
    world.done()
    world.control.on_kept(1, 0.0)
    assert world.replies[asked].values["weight_version"] == "default"  # no other was asked for
    assert world.paused, "the pause was not the update's own"


def test_a_pause_that_continue_overtakes_is_told(world: World) -> None:
    world.harness.add(request(0, [1] * 5, max_new_tokens=50))
    world.harness.step()
    paused, back = world.ask("pause", mode="wait"), world.ask("continue")
    assert code(world.replies[paused]) == "internal_error"
    assert code(world.replies[back]) is None
    world.run()
    assert world.harness.samples[0].finish is not None


def test_what_the_ranks_refuse_leaves_all_as_it_was(world: World) -> None:
    asked = world.update("v1")
    world.done(ErrorInfo("invalid_request", "a NaN", "path"))
    assert code(world.replies[asked]) == "invalid_request"
    assert (world.version, world.versions, world.kept, world.paused) == ("default", [], [], False)
    world.harness.add(request(0, [1] * 5, max_new_tokens=5))
    world.run()
    assert world.harness.samples[0].finish is not None


@pytest.mark.parametrize("told", [False, True], ids=["while they load", "before the launcher answers"])
@pytest.mark.parametrize("new", [False, True], ids=["with the old", "with the new"])
def test_ranks_that_die_meanwhile_tell_which_weights_they_have(world: World, told: bool, new: bool) -> None:
    """By the number: names may be the same."""
    asked = world.update()
    if told:
        world.done()
    world.harness.lose_ranks()
    world.turn()
    assert asked not in world.replies
    assert world.ranks_are_back(world.control._operation.weights if new else START)  # type: ignore
    assert code(world.replies[asked]) == (None if new else "internal_error")
    assert world.control.weights.number == int(new)
    world.control.on_kept(1, 0.0)  # late: means nothing any more
    assert world.control.weights.number == int(new)
    assert not world.paused


def test_an_update_waits_for_ranks_that_are_starting(world: World) -> None:
    world.harness.lose_ranks()
    asked = world.update("v1")
    assert not world.ranks
    world.ranks_are_back(START)
    assert len(world.ranks) == 1
    assert asked not in world.replies


def test_sleep_and_wake(world: World) -> None:
    world.harness.add(request(0, [1] * 5, max_new_tokens=10))
    world.harness.step()
    asked = world.ask("sleep", level=1, mode="keep")
    world.run()
    assert world.ranks == [SleepRank(1)]
    world.done()
    assert world.replies[asked].error is None
    assert (world.control.sleep_level, world.paused) == (1, False)
    assert not world.harness.schedule()
    deeper = world.ask("sleep", level=2, mode="abort")
    world.done()
    assert world.replies[deeper].error is None
    assert world.control.sleep_level == 2
    updated = world.update("v1")
    world.control.on_kept(1, 0.0)
    assert world.replies[updated].values["weight_version"] == "v1"
    woken = world.ask("wake")
    assert world.ranks[1:] == [SleepRank(2), WakeRank(Weights(world.folder, "v1", 1))]
    world.harness.rank = world.harness._new_rank(100, 0)
    assert world.ranks_are_back(Weights(world.folder, "v1", 1))
    assert world.replies[woken].error is None
    assert world.control.sleep_level == 0
    again = world.ask("wake")
    assert world.replies[again].error is None
    world.run()


def test_ranks_that_die_in_their_sleep_sleep_on(world: World) -> None:
    world.ask("sleep", level=1, mode="keep")
    world.done()
    world.harness.lose_ranks()
    assert not world.ranks_are_back(START)
    assert world.ranks[-1] == SleepRank(1, epoch=1)
    assert not world.harness.scheduler.state.has_ranks
    world.done()  # nobody waits for that
    woken = world.ask("wake")
    world.harness.lose_ranks()
    assert world.ranks_are_back(START)
    assert world.replies[woken].error is None


def test_what_comes_before_they_sleep_again_waits_for_its_own_answer(world: World) -> None:
    world.ask("sleep", level=1, mode="keep")
    world.done()
    world.harness.lose_ranks()
    assert not world.ranks_are_back(START)
    updated = world.update("v1")
    world.done()  # they sleep again
    assert not world.kept
    world.done()
    assert [weights.version for weights in world.kept] == ["v1"]
    world.control.on_kept(1, 0.0)
    assert world.replies[updated].error is None
    world.harness.lose_ranks()
    assert not world.ranks_are_back(world.kept[0])
    woken = world.ask("wake")
    world.done()  # they sleep again
    assert woken not in world.replies
    assert world.ranks_are_back(world.kept[0])
    assert world.replies[woken].error is None


def test_sleepers_that_are_starting_again_are_told_nothing(world: World) -> None:
    """They do not know that they should sleep, and would take it for something else."""
    world.ask("sleep", level=1, mode="keep")
    world.done()
    world.harness.lose_ranks()
    told = len(world.ranks)
    updated = world.update("v1")
    assert len(world.ranks) == told
    assert not world.ranks_are_back(START)
    assert [type(message) for message in world.ranks[told:]] == [SleepRank, LoadWeights]
    for _ in range(2):
        world.done()
    world.control.on_kept(1, 0.0)
    assert world.replies[updated].error is None
    world.harness.lose_ranks()
    told = len(world.ranks)
    woken = world.ask("wake")
    assert world.ranks_are_back(world.kept[0])
    assert len(world.ranks) == told
    assert world.replies[woken].error is None
    assert world.control.sleep_level == 0


@pytest.mark.parametrize(
    ("what", "args", "field"),
    [
        ("pause", {"mode": "stop"}, "mode"),
        ("pause", {}, "mode"),
        ("sleep", {"level": 3, "mode": "keep"}, "level"),
        ("sleep", {"level": 1, "mode": 7}, "mode"),
        ("update_weights", {}, "path"),
        ("update_weights", {"path": "\0"}, "path"),
        ("update_weights", {"path": "/nowhere/at/all"}, "path"),
        ("update_weights", {"path": "FOLDER", "weight_version": ""}, "weight_version"),
        ("update_weights", {"path": "FOLDER", "weight_version": 3}, "weight_version"),
        ("update_weights", {"path": "FOLDER", "weight_version": "x" * 257}, "weight_version"),
        ("update_weights", {"path": "FOLDER", "flush_cache": False}, "flush_cache"),
        ("update_weights", {"path": "FOLDER", "flush_cache": False, "weight_version": "default"}, "flush_cache"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(world: World, what: str, args: dict[str, Any], field: str) -> None:
    reply = world.replies[world.ask(what, **{k: world.folder if v == "FOLDER" else v for k, v in args.items()})]
    assert reply.error is not None
    assert (reply.error.code, reply.error.field) == ("invalid_request", field)
    assert "\n" not in reply.error.message
    assert not world.paused
    assert not world.ranks


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"vocab_size": 255}, "vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_a_model_of_another_shape_is_refused(world: World, tmp_path: Path, change: dict[str, Any], field: str) -> None:
    make_checkpoint(tmp_path, DENSE | change)
    reply = world.replies[world.ask("update_weights", path=str(tmp_path))]
    assert reply.error is not None
    assert reply.error.field == field
    assert not world.ranks


def test_files_that_are_not_whole_are_refused(world: World, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, DENSE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    reply = world.replies[world.ask("update_weights", path=str(tmp_path))]
    assert reply.error is not None
    assert "is not a whole safetensors file" in reply.error.message
    assert not world.ranks


@pytest.mark.parametrize(
    ("args", "words"),
    [({"nnodes": 2, "tp": 2, "dist_init_addr": "127.0.0.1:1234"}, "one node"), ({"cache_dir": "/c"}, "--cache-dir")],
)
def test_what_does_not_go_together_is_refused(folder: Path, args: dict[str, Any], words: str) -> None:
    world = World(folder, **args)
    replies = [world.replies[world.update()], world.replies[world.ask("sleep", level=1, mode="keep")]]
    assert all(reply.error is not None and words in reply.error.message for reply in replies)


def test_the_spec_file_tells_the_weights_in_force(folder: Path) -> None:
    spec = World(folder).control._spec
    assert spec.weights == START
    new = Weights("/new", "v", 3)
    later = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(spec, new_weights=new)), type=PipelineSpec)
    assert later.weights == new
    dummy = msgspec.structs.replace(spec, args=ServerArgs(load_format="dummy", weight_version="x"))
    assert dummy.weights == Weights("", "x")
