"""A task that is to end does end."""

from __future__ import annotations

import asyncio

from casemate_messaging.tasks import end


class _Rounds:
    """Goes round for ever, and loses its first ``losses`` cancellations, as ``asyncio.wait_for`` of Python 3.11 may."""

    def __init__(self, losses: int) -> None:
        self.losses = losses

    async def run(self) -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.losses -= 1
                if self.losses < 0:
                    raise


async def test_a_lost_cancellation_is_given_again_and_no_other_task_hears_more_than_one() -> None:
    losing, heeding = _Rounds(3), _Rounds(0)
    tasks = [asyncio.create_task(rounds.run()) for rounds in (losing, heeding)]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end(tasks, again_s=0.001)
    assert all(task.cancelled() for task in tasks)
    assert (losing.losses, heeding.losses) == (-1, -1)


async def test_what_has_ended_is_left_as_it_is() -> None:
    async def gives() -> int:
        return 7

    async def fails() -> int:
        raise ValueError

    tasks = [asyncio.create_task(gives()), asyncio.create_task(fails())]
    await asyncio.wait(tasks)
    await end(tasks)
    assert tasks[0].result() == 7 and isinstance(tasks[1].exception(), ValueError)
    await end([])
