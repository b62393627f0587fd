"""Nonces of HTTP requests already seen: a bucket that forgets by itself."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import nats.js.errors
from casemate_schemas import subjects
from nats.aio.client import Client
from nats.js.api import Header

from .connection import REQUEST_TIMEOUT_S, is_wrong_revision, translated

_MAX_REMEMBERED: Final = 1 << 16
"""Nonces that one gateway knows by itself, some fifteen megabytes."""


class NonceStore:
    """The bucket ``nonces``, shared by all gateways.

    It remembers for ``StreamSettings.nonce_age_s``, so a request's own expiry must be shorter than that. A NATS that is
    killed, or loses its power, may forget the last ones (``setup.py``): the gateway that recorded one still knows it, as one
    of its newest. What a nonce guards must bear being done again by another.
    """

    def __init__(self, client: Client) -> None:
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._recorded: OrderedDict[str, None] = OrderedDict()

    async def first_use(self, key: str) -> bool:
        """True for the first caller with this ``key`` (a hexadecimal digest), False for all others.

        Raises :class:`MalformedError` for a key that is no token, :class:`StorageFullError`,
        :class:`UnavailableError`: then the request must be refused.
        """
        subject = f"$KV.{subjects.NONCE_BUCKET}.{subjects.token(key)}"
        if key in self._recorded:
            return False
        with translated("recording a nonce"):
            try:
                await self._js.publish(subject, headers={Header.EXPECTED_LAST_SUBJECT_SEQUENCE: "0"})
            except nats.js.errors.APIError as error:
                if not is_wrong_revision(error):
                    raise
                return False
        self._recorded[key] = None
        if len(self._recorded) > _MAX_REMEMBERED:
            self._recorded.popitem(last=False)
        return True
