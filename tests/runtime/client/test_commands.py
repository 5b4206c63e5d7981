"""What is taken runs, exactly once and in order; what is not taken is said so."""

from __future__ import annotations

import select
import threading

from vibe_sgl_lite.runtime.client.commands import Commands


def test_what_is_taken_runs() -> None:
    commands, ran = Commands(lambda: True), list[tuple[int, int]]()
    taken: dict[int, list[int]] = {number: [] for number in range(4)}

    def post(number: int) -> None:
        count = 0
        while count < 1000 and commands.post(lambda count=count: ran.append((number, count))):  # type: ignore[misc]
            taken[number].append(count)
            count += 1

    threads = [threading.Thread(target=post, args=(number,)) for number in taken]
    for thread in threads:
        thread.start()
    while len(ran) < 2000:
        assert select.select([commands.wakes], [], [], 30)[0], "nobody woke the thread"
        commands.run()
    commands.close()
    for thread in threads:
        thread.join(30)
    commands.dispose()
    for number, counts in taken.items():
        assert [count for who, count in ran if who == number] == counts
    assert not commands.post(lambda: None)


def test_nothing_is_taken_without_a_thread() -> None:
    commands = Commands(lambda: False)
    assert not commands.post(lambda: None)
    commands.close()
    commands.dispose()


def test_a_command_may_post_another() -> None:
    commands, ran = Commands(lambda: True), list[str]()
    commands.post(lambda: ran.append("first") if commands.post(lambda: ran.append("second")) else None)
    commands.run()
    assert ran == ["first", "second"]
    commands.close()
    commands.dispose()
