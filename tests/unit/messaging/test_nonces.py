"""What one gateway knows of nonces by itself, when NATS has forgotten them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from casemate_messaging import nonces
from casemate_messaging.nonces import NonceStore
from casemate_schemas.errors import UnavailableError


class Forgetful:
    """Records every nonce as if it had never seen it, or raises."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def jetstream(self, **_: object) -> Any:
        async def publish(*_: object, **__: object) -> None:
            if self.error is not None:
                raise self.error

        return SimpleNamespace(publish=publish)


async def test_a_gateway_knows_what_it_recorded_although_nats_forgot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonces, "_MAX_REMEMBERED", 2)
    client: Any = Forgetful()
    store = NonceStore(client)
    assert [await store.first_use(key) for key in ("a", "a", "b", "a", "b")] == [True, False, True, False, False]
    assert await store.first_use("c")
    assert len(store._recorded) == 2, "bounded: the oldest one is forgotten"
    assert not await store.first_use("b")


async def test_what_could_not_be_recorded_is_not_used_up() -> None:
    client: Any = Forgetful()
    store, client.error = NonceStore(client), TimeoutError()
    with pytest.raises(UnavailableError):
        await store.first_use("a")
    client.error = None
    assert await store.first_use("a")
