"""How schemathesis signs what it sends, and what it finds when it looks: loaded by ``st run`` (``SCHEMATHESIS_HOOKS``).

It asks as a real person, so it gets past the door. Some bodies and some names in paths are real ones, most are not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import schemathesis
from casemate_schemas.api import MEDIA_TYPE, UPLOAD_MEDIA_TYPE
from casemate_schemas.keyring import KeyRing
from hypothesis import strategies as st
from requests import PreparedRequest
from requests.auth import AuthBase
from support.http import signed_request

FOLDER = Path(os.environ["CASEMATE_TEST_PERSON"])
PERSON = KeyRing.from_text((FOLDER / "person.pem").read_text())
NAMES: dict[str, list[str]] = json.loads((FOLDER / "names.json").read_text())
BODIES = [path.read_bytes() for path in sorted(FOLDER.glob("*.body"))]


class Signed(AuthBase):
    """RFC 9421, anew for every request; a header that is left out on purpose stays away."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        body = request.body or b""
        if isinstance(body, str):
            body = body.encode()
        assert PERSON.delegation is not None and request.url is not None and isinstance(body, bytes)
        signed = signed_request(PERSON.signing, PERSON.delegation, request.method or "", request.url, body)
        request.headers.update({k: v for k, v in signed.headers.items() if k in request.headers})
        return request


schemathesis.auth.set_from_requests(Signed())
for media_type in (MEDIA_TYPE, UPLOAD_MEDIA_TYPE):
    schemathesis.openapi.media_type(media_type, st.sampled_from(BODIES) | st.binary(max_size=600))


@schemathesis.hook
def map_path_parameters(_: Any, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Every other time something that is there; of key brokers always, since nobody answers for others."""
    for name, value in (found or {}).items():
        text = str(value)
        if text and (known := NAMES.get(name)) and (name == "key_broker" or ord(text[-1]) % 2):
            found[name] = known[ord(text[0]) % len(known)]  # type: ignore[index]
    return found
