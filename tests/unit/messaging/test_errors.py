"""Errors of NATS in words of our own tree."""

from __future__ import annotations

import json

import nats.errors
import nats.js.errors
import pytest
from casemate_messaging.connection import casemate_error, check_server_version, connect, translated
from casemate_messaging.server import create_user_key
from casemate_schemas.errors import (
    ConflictError,
    NotFoundError,
    SetupError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (nats.errors.TimeoutError(), UnavailableError),
        (nats.errors.NoRespondersError(), UnavailableError),
        (nats.errors.ConnectionClosedError(), UnavailableError),
        (nats.errors.OutboundBufferLimitError(), UnavailableError),
        (nats.errors.MaxPayloadError(), TooLargeError),
        (nats.js.errors.NoStreamResponseError(), UnavailableError),
        (nats.js.errors.KeyNotFoundError(), NotFoundError),
        (nats.js.errors.NotFoundError(code=404, err_code=10059), NotFoundError),
        (nats.js.errors.KeyWrongLastSequenceError("wrong last sequence: 3"), ConflictError),
        (nats.js.errors.BadRequestError(code=400, err_code=10071), ConflictError),
        (nats.js.errors.ServerError(code=500, err_code=10047), StorageFullError),
        (
            nats.js.errors.ServiceUnavailableError(code=503, err_code=10077, description="maximum bytes exceeded"),
            StorageFullError,
        ),
        (
            nats.js.errors.ServiceUnavailableError(code=503, err_code=10077, description="something else"),
            UnavailableError,
        ),
        (nats.js.errors.ServiceUnavailableError(code=503, err_code=10008), UnavailableError),
        (OSError("broken pipe"), UnavailableError),
    ],
)
def test_each_error_has_its_class(error: Exception, expected: type) -> None:
    assert type(casemate_error(error, "x")) is expected


def test_translation_keeps_the_cause_and_lets_others_pass() -> None:
    with pytest.raises(UnavailableError) as caught, translated("storing"):
        raise nats.errors.TimeoutError
    assert isinstance(caught.value.__cause__, nats.errors.TimeoutError)
    with pytest.raises(UnavailableError), translated("storing"):
        json.loads(b'{"stream": "JOB')  # as nats-py does with an answer that was cut short
    with pytest.raises(KeyError), translated("storing"):
        raise KeyError("x")
    with pytest.raises(NotFoundError), translated("storing"):
        raise NotFoundError("ours")


class _Connected:
    def __init__(self, major: int, minor: int) -> None:
        self.connected_server_version = type("V", (), {"major": major, "minor": minor})


@pytest.mark.parametrize(("version", "accepted"), [((2, 12), False), ((1, 20), False), ((2, 14), True), ((3, 0), True)])
def test_old_servers_are_refused(version: tuple[int, int], accepted: bool) -> None:
    if accepted:
        check_server_version(_Connected(*version))
    else:
        with pytest.raises(SetupError, match=r"2\.14 or newer"):
            check_server_version(_Connected(*version))


async def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path) -> None:
    create_user_key(tmp_path / "k")
    with pytest.raises(SetupError) as caught:
        await connect("nats://me:hunter2@127.0.0.1:4222", tmp_path / "k", user="gateway")
    assert "hunter2" not in str(caught.value)
