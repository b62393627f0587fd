"""What this machine remembers of a consortium: the newest manifest seen, and the jobs submitted from here.

One folder a consortium, readable by its owner only. Files are written beside and renamed, so a reader sees the old or the
new one. It holds no private key; losing it costs the protection against older manifests, nothing else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from casemate_messaging.files import write_durably
from casemate_schemas.admission import Submission
from casemate_schemas.codec import Digest, M, WireModel, decode, encode
from casemate_schemas.consortium import Consortium, KeyBroker, ManifestChain, verify_chain
from casemate_schemas.errors import CasemateError, IntegrityError, SetupError, SignatureError
from casemate_schemas.job import JobId
from casemate_schemas.requests import LedgerHead
from casemate_schemas.signatures import Signed
from pydantic import Field

_MAX_STATE_BYTES = 4 << 20


class Pin(WireModel):
    """The newest manifest seen."""

    KIND: ClassVar[str] = "manifest-pin"

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1, lt=1 << 32)]
    digest: Digest


class SubmittedJob(WireModel):
    """What was submitted, so that it can be posted again as it was and its result be held against it."""

    KIND: ClassVar[str] = "submitted-job"

    version: Literal[1] = 1
    job_id: JobId
    salt: Digest
    terms: Signed
    submission: Submission


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/casemate``, or ``~/.local/state/casemate``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "casemate"


class State:
    """The folder of one consortium."""

    def __init__(self, state_dir: Path, consortium: bytes) -> None:
        self._folder = state_dir / consortium.hex()

    def accept_chain(self, chain: ManifestChain, consortium: bytes) -> tuple[Consortium, bool]:
        """The verified consortium, now pinned at its newest version; and whether this was the first time.

        Raises :class:`~casemate_schemas.errors.ManifestError` for a chain that does not hold, belongs to another
        consortium, or does not contain the pinned version: an older one or a fork is never accepted.
        """
        with self._locked():
            pin = self._read(Pin, "pin")
            seen = None if pin is None else (pin.number, pin.digest)
            verified = verify_chain(chain, consortium=consortium, pinned=seen)
            self._write("pin", Pin(number=verified.manifest.number, digest=verified.digest))
        return verified, pin is None

    def remember_job(self, job: SubmittedJob) -> SubmittedJob:
        """Keep what is to be submitted, unless something was kept under that id before; what is kept."""
        with self._locked():
            known = self._read(SubmittedJob, _job_file(job.job_id))
            if known is None:
                self._write(_job_file(job.job_id), job)
        return known or job

    def job(self, job_id: str) -> SubmittedJob | None:
        """What was submitted from here under that id."""
        return self._read(SubmittedJob, _job_file(job_id))

    def download_path(self, envelope: bytes) -> Path:
        """Where the beginning of an envelope is kept while it is fetched: ciphertext, not verified yet."""
        return self._folder / f"download-{envelope.hex()}"

    def remember_ledger_head(self, broker: KeyBroker, consortium: bytes, signed: Signed) -> None:
        """Keep the newest head of a key broker's ledger, to be shown to it: it can tell by it that it was set back.

        Raises :class:`~casemate_schemas.errors.SignatureError` for a head that the key broker did not sign.
        """
        head = signed.verify(LedgerHead, broker.signing_key)
        if (head.consortium, head.key_broker) != (consortium, broker.id):
            raise SignatureError(f"key broker {broker.id} shows the head of another one")
        with self._locked():
            known = self._read(Signed, _head_file(broker.id))
            if known is None or known.signer != broker.signing_key or _reach(known) < _reach(signed):
                self._write(_head_file(broker.id), signed)

    def ledger_head(self, broker: KeyBroker) -> Signed | None:
        """The newest head seen of a key broker's ledger under the key that it has now."""
        known = self._read(Signed, _head_file(broker.id))
        return known if known is not None and known.signer == broker.signing_key else None

    def _read(self, model: type[M], name: str) -> M | None:
        try:
            with open(self._folder / name, "rb") as file:
                data = file.read(_MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SetupError(f"cannot read {self._folder / name}: {error.strerror}") from error
        try:
            return decode(model, data, max_bytes=_MAX_STATE_BYTES)
        except CasemateError as error:
            raise IntegrityError(f"{self._folder / name} is broken: {error}") from error

    def _write(self, name: str, message: WireModel) -> None:
        try:
            write_durably(self._folder / name, encode(message))
        except OSError as error:
            raise SetupError(f"cannot write {self._folder / name}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: read, check and write happen as one, so a pin never moves back."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SetupError(f"cannot use the state folder {self._folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _head_file(key_broker: str) -> str:
    return f"ledger-head-{key_broker}"


def _reach(signed: Signed) -> tuple[int, int, int]:
    head = signed.peek(LedgerHead)
    return head.branch, head.entries, head.audit_size


def _job_file(job_id: str) -> str:
    return f"job-{job_id}"
