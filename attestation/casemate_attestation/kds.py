"""Where a chip's certificates and revocation lists come from: AMD's key distribution service (KDS), or a folder.

Source: AMD 57230, chapter 4: ``/vcek/v1/{product}/{hwID}?{levels}`` (DER), ``/{vcek,vlek}/v1/{product}/cert_chain``
(two PEM certificates, intermediate first) and ``/vcek/v1/{product}/crl`` (DER). VLEK certificates are handed to cloud
providers only: their hosts have to provide them.

Nothing from here is trusted: the relying party verifies every certificate again. What a folder holds is nevertheless
checked each time it is read, so that a broken or swapped file is fetched anew instead of failing for ever.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AppraisalPolicy
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS
from casemate_schemas.errors import (
    MalformedError,
    NotFoundError,
    SetupError,
    ThrottledError,
    UnavailableError,
    VerificationError,
)

from .certificates import (
    INTERMEDIATE_PREFIX,
    MAX_CERTIFICATE_BYTES,
    MAX_CRL_BYTES,
    Certificate,
    RevocationList,
    VekKind,
    authority_profile,
    crl_profile,
    parse_certificate,
    parse_crl,
    signed_by,
    vek_profile,
)
from .https import Fetch
from .policy_file import read_bounded
from .products import CHIP_ID_BYTES, Product, TcbVersion, decode_tcb, product_of_cpuid
from .report import AttestationReport

AMD_KDS_URL: Final = "https://kdsintf.amd.com"
MAX_CHAIN_BYTES: Final = 64 << 10

Roots = Mapping[Product, Collection[bytes]]
"""SHA-256 of the accepted ARKs, by product."""
AMD_ROOTS_BY_PRODUCT: Final[Roots] = MappingProxyType({name: (digest,) for name, digest in AMD_ARK_SHA256.items()})

Check = Callable[[tuple[bytes, ...]], None]
"""Raises :class:`VerificationError` or :class:`MalformedError` for files that are not the expected ones."""

_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_WRITABLE_BY_OTHERS: Final = 0o022


@dataclass(frozen=True)
class KdsLimits:
    """How often the service may be asked, and how old a revocation list may grow."""

    interval_s: float = 10.0
    """The least time between two requests; the service answers about one in this time."""
    max_wait_s: float = 45.0
    """The longest that one call waits for its turn."""
    crl_max_age_s: float = 7 * 86400.0
    """How long after it was fetched a revocation list may be used."""


def roots_of(policy: AppraisalPolicy) -> Roots:
    """The roots that ``policy`` or a later one of the same consortium accepts: AMD's, or in simulation those it lists."""
    if not policy.simulation:
        return AMD_ROOTS_BY_PRODUCT
    return {accepted.product: accepted.ark_sha256 for accepted in policy.products}


def vcek_url(base_url: str, product: Product, hardware_id: bytes, tcb: TcbVersion) -> str:
    """Where the VCEK of a chip at a TCB is. Turin has 8 bytes of hwID and an FMC level, others 64 bytes and none."""
    levels = {"blSPL": tcb.bl, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.ucode}
    levels |= {"fmcSPL": tcb.fmc} if product == "Turin" else {}
    query = "&".join(f"{name}={level:02}" for name, level in levels.items())
    return f"{base_url.rstrip('/')}/vcek/v1/{product}/{hardware_id.hex()}?{query}"


def chain_url(base_url: str, product: Product, kind: VekKind) -> str:
    """Where ASK (or ASVK) and ARK are."""
    return f"{base_url.rstrip('/')}/{kind}/v1/{product}/cert_chain"


def crl_url(base_url: str, product: Product) -> str:
    """Where the ARK's revocation list is."""
    return f"{base_url.rstrip('/')}/vcek/v1/{product}/crl"


def vek_file(product: Product, kind: VekKind, chip_id: bytes, reported_tcb: bytes) -> str:
    """The name that a VEK certificate has in a folder: a VLEK is its provider's, a VCEK one chip's."""
    chip = "" if kind == "vlek" else f"_{chip_id[: CHIP_ID_BYTES[product]].hex()}"
    return f"{kind}_{product.lower()}{chip}_{reported_tcb.hex()}.der"


def crl_file(product: Product) -> str:
    """The name that a revocation list has in a folder."""
    return f"crl_{product.lower()}.der"


class KdsClient:
    """Certificates and revocation lists for the products of ``roots``, from a folder, and from the service if there is one.

    Thread-safe. Requests are made one at a time, ``interval_s`` apart, and a second caller for the same thing finds what
    the first has fetched.

    Args:
        folder: where they are kept: made with mode 0700 if need be; others may not write to it.
        roots: products (tried in this order for a report that names none) and their accepted ARKs.
        fetch: how to ask the service; without it nothing is fetched, and the folder has to hold everything (offline).
        base_url: AMD's service, or a mirror of it.
        clock: Unix ms.
        wait: how to pass so many seconds.

    Raises :class:`SetupError` for a folder that others may write to.
    """

    def __init__(
        self,
        folder: Path,
        roots: Roots,
        *,
        fetch: Fetch | None = None,
        base_url: str = AMD_KDS_URL,
        limits: KdsLimits | None = None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = _Folder(folder)
        self._roots = roots
        self._fetch = fetch
        self._base_url = base_url
        self._limits = limits or KdsLimits()
        self._clock = clock
        self._monotonic = monotonic
        self._wait = wait
        self._lock = threading.RLock()
        self._next_request = float("-inf")

    @property
    def online(self) -> bool:
        """Whether it can ask the service."""
        return self._fetch is not None

    def product_of(self, ark: bytes) -> Product | None:
        """The product whose accepted root ``ark`` (DER) is, or None."""
        digest = hashlib.sha256(ark).digest()
        return next((product for product, accepted in self._roots.items() if digest in accepted), None)

    # --- certificates -------------------------------------------------------------------------------------------------

    def certificates(self, report: bytes) -> tuple[bytes, bytes, bytes]:
        """VEK, intermediate and ARK (DER) that ``report`` should verify under.

        1. Which kind of key signed it, for which product? By CPUID; a version 2 report has none: a CHIP_ID with more than
           8 bytes is not Turin's, and the remaining accepted products are tried in order.
        2. Intermediate and ARK: one of the accepted roots.
        3. The VEK of this chip (VCEK) at the reported TCB, signed by that intermediate.

        Raises :class:`MalformedError` if that is no report, :class:`UnavailableError` (of which :class:`ThrottledError`)
        if the service has to be asked again later, and :class:`SetupError` if it cannot help: it says what is missing
        and where to put it.
        """
        parsed = AttestationReport.parse(report)
        kind = parsed.signing_key
        if kind is None:
            raise SetupError("the report was not signed by a VCEK or VLEK")
        if kind == "vcek" and (parsed.chip_key_masked or not any(parsed.chip_id)):
            raise SetupError("the host hides the chip's id: have it provide the certificates, or not mask the id")
        missing = []
        for product in self._candidates(parsed):  # 1
            try:
                intermediate, ark = self.chain(product, kind)  # 2
                return self._vek(parsed, product, kind, intermediate), intermediate, ark  # 3
            except NotFoundError as error:
                missing.append(f"{product}: {error}")
        raise SetupError("; ".join(missing) or f"expected a report of {', '.join(self._roots)}")

    def chain(self, product: Product, kind: VekKind) -> tuple[bytes, bytes]:
        """ASK or ASVK, and ARK. Raises as :meth:`certificates`, and :class:`NotFoundError` if there is none."""
        names, check = _chain_files(product, kind), self._chain_check(product, kind)
        intermediate, ark = self._item(names, chain_url(self._base_url, product, kind), check, _chain_of_pem)
        return intermediate, ark

    def _vek(self, report: AttestationReport, product: Product, kind: VekKind, intermediate: bytes) -> bytes:
        hardware_id = report.chip_id[: CHIP_ID_BYTES[product]]
        tcb = decode_tcb(report.reported_tcb, product)

        def check(blobs: tuple[bytes, ...]) -> None:
            vek, authority = parse_certificate(blobs[0]), parse_certificate(intermediate)
            facts = vek_profile(vek)
            expected = (kind, product, tcb, hardware_id if kind == "vcek" else None)
            if (facts.kind, facts.product, facts.tcb, facts.hardware_id) != expected:
                raise VerificationError("expected the certificate of this chip at its reported TCB, got another")
            self._check_issued(vek, authority)

        name = vek_file(product, kind, report.chip_id, report.reported_tcb)
        if kind == "vlek":
            return self._given(name, check)
        url = vcek_url(self._base_url, product, hardware_id, tcb)
        return self._item((name,), url, check, lambda body: (body,))[0]

    def _candidates(self, report: AttestationReport) -> tuple[Product, ...]:
        named = product_of_cpuid(report.cpuid_family, report.cpuid_model)
        if report.version >= 3:
            return tuple(product for product in self._roots if product == named)
        if report.signing_key == "vlek":
            return tuple(self._roots)
        is_turin = not any(report.chip_id[CHIP_ID_BYTES["Turin"] :])
        return tuple(product for product in self._roots if (product == "Turin") == is_turin)

    def _chain_check(self, product: Product, kind: VekKind) -> Check:
        def check(blobs: tuple[bytes, ...]) -> None:
            self._check_chain(*map(parse_certificate, blobs), product=product, kind=kind)

        return check

    def _check_chain(self, intermediate: Certificate, ark: Certificate, *, product: Product, kind: VekKind) -> None:
        if hashlib.sha256(ark.der).digest() not in self._roots.get(product, ()):
            raise VerificationError(f"expected an accepted root for {product}, got another")
        if intermediate.common_name != INTERMEDIATE_PREFIX[kind] + product:
            raise VerificationError(f"expected {INTERMEDIATE_PREFIX[kind]}{product}, got {intermediate.common_name!r}")
        authority_profile(ark, may_issue_crls=True)
        authority_profile(intermediate, may_issue_crls=False)
        self._check_issued(ark, ark)
        self._check_issued(intermediate, ark)

    def _check_issued(self, certificate: Certificate, authority: Certificate) -> None:
        """That ``authority`` signed ``certificate``, and that it is in date."""
        issued = certificate.issuer == authority.subject
        if not issued or not signed_by(certificate.tbs, certificate.signature, authority):
            raise VerificationError(f"{authority.common_name!r} did not sign {certificate.common_name!r}")
        if not certificate.not_before <= self._now() <= certificate.not_after:
            raise VerificationError(f"{certificate.common_name!r} is not in date")

    # --- revocation lists ---------------------------------------------------------------------------------------------

    def cached_crl(self, product: Product) -> bytes:
        """The revocation list (DER) at hand. Asks nobody.

        Raises :class:`UnavailableError` unless there is one that the ARK signed, that is current, and that was fetched at
        most ``crl_max_age_s`` ago: a stale list is never returned.
        """
        name = crl_file(product)
        age_ms = self._folder.age_ms(name, self._clock())
        if age_ms is None:
            raise UnavailableError(f"no revocation list for {product} at hand: expected {self._folder.path / name}")
        if not -MAX_CLOCK_SKEW_MS <= age_ms <= self._limits.crl_max_age_s * 1000:
            raise UnavailableError(f"the revocation list for {product} at hand was fetched too long ago")
        try:
            body = self._folder.read(name, MAX_CRL_BYTES) or b""
            self._check_crl(body, self._held_ark(product))
        except (MalformedError, VerificationError) as error:
            raise UnavailableError(f"the revocation list for {product} at hand is not usable: {error}") from error
        return body

    def refresh_crl(self, product: Product) -> bytes:
        """The revocation list (DER) that the service has now; from here on it is the one at hand.

        Raises :class:`UnavailableError` (of which :class:`ThrottledError`) if there is none, if it is not a current list
        by an accepted ARK, or if it is older than the one at hand; that one then stays. :class:`SetupError` if offline.
        """
        if self._fetch is None:
            raise SetupError("revocation lists are fetched online only")
        with self._lock:
            try:
                ark = parse_certificate(self.chain(product, "vcek")[1])
                body = self._get(crl_url(self._base_url, product), MAX_CRL_BYTES)
                if self._check_crl(body, ark).last_update < self._last_update(product, ark):
                    raise VerificationError("a list older than the one at hand")
            except (MalformedError, VerificationError, NotFoundError) as error:
                raise UnavailableError(f"no usable revocation list for {product}: {error}") from error
            self._folder.write(crl_file(product), body, self._clock())
            return body

    def _last_update(self, product: Product, ark: Certificate) -> datetime:
        """When the list at hand was issued; the beginning of time if none is usable."""
        try:
            held = self._folder.read(crl_file(product), MAX_CRL_BYTES) or b""
            return self._check_crl(held, ark).last_update
        except (MalformedError, VerificationError):
            return datetime.min.replace(tzinfo=UTC)

    def _held_ark(self, product: Product) -> Certificate:
        if (held := self._held(_chain_files(product, "vcek"), self._chain_check(product, "vcek"))) is None:
            raise VerificationError("the certificate of the ARK that signed it is not at hand")
        return parse_certificate(held[1])

    def _check_crl(self, body: bytes, ark: Certificate) -> RevocationList:
        crl = parse_crl(body)
        crl_profile(crl)
        if crl.issuer != ark.subject or not signed_by(crl.tbs, crl.signature, ark):
            raise VerificationError(f"{ark.common_name!r} did not sign the list")
        if crl.next_update is None or not crl.last_update <= self._now() < crl.next_update:
            raise VerificationError(f"expected a current list, got one of {crl.last_update:%F}")
        return crl

    # --- folder and service -------------------------------------------------------------------------------------------

    def _item(
        self,
        names: tuple[str, ...],
        url: str,
        check: Check,
        split: Callable[[bytes], tuple[bytes, ...]],
    ) -> tuple[bytes, ...]:
        """The files ``names`` that pass ``check``: from the folder, else from ``url``, and then also in the folder."""
        if (held := self._held(names, check)) is not None:
            return held
        if self._fetch is None:
            raise NotFoundError(
                f"{self._folder.path / names[0]} is missing or unusable, and nothing is fetched: run 'casemate attestation "
                f"fetch' with this report where {self._base_url} can be reached, and copy the files to that folder"
            )
        with self._lock:
            if (held := self._held(names, check)) is not None:
                return held
            try:
                blobs = split(self._get(url, MAX_CHAIN_BYTES))
                check(blobs)
            except (MalformedError, VerificationError) as error:
                raise UnavailableError(f"no usable answer from {self._base_url}: {error}") from error
            for name, blob in zip(names, blobs, strict=True):
                self._folder.write(name, blob, self._clock())
            return blobs

    def _given(self, name: str, check: Check) -> bytes:
        """A VLEK certificate."""
        if (held := self._held((name,), check)) is None:
            raise NotFoundError(
                "a VLEK signed the report, and the key distribution service hands out no VLEK certificates: use the host's "
                f"certificate table (no setting kds_cache_dir), or put the certificate at {self._folder.path / name} (DER)"
            )
        return held[0]

    def _held(self, names: tuple[str, ...], check: Check) -> tuple[bytes, ...] | None:
        blobs = tuple(self._folder.read(name, MAX_CERTIFICATE_BYTES) or b"" for name in names)
        if not all(blobs):
            return None
        try:
            check(blobs)
        except (MalformedError, VerificationError):
            return None
        return blobs

    def _get(self, url: str, max_bytes: int) -> bytes:
        """One request in its turn; told to wait, it asks again if that ends within ``max_wait_s``."""
        if self._fetch is None:
            raise SetupError("nothing is fetched offline")  # callers ask before: this tells the type checker
        deadline = self._monotonic() + self._limits.max_wait_s
        while True:
            self._take_turn(deadline)
            try:
                return self._fetch(url, max_bytes)
            except ThrottledError as error:
                self._next_request = self._monotonic() + max(error.retry_after_s, self._limits.interval_s, 1.0)

    def _take_turn(self, deadline: float) -> None:
        wait_s = self._next_request - self._monotonic()
        if wait_s > 0:
            if self._next_request > deadline:
                raise ThrottledError(f"{self._base_url} can be asked again in {wait_s:.0f} s", wait_s)
            self._wait(wait_s)
        self._next_request = self._monotonic() + self._limits.interval_s

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock() / 1000, UTC)


class _Folder:
    """Small files, each whole or not there."""

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = path.stat().st_mode
        except OSError as error:
            raise SetupError(f"expected a folder for certificates at {path}: {error.strerror}") from error
        if mode & _WRITABLE_BY_OTHERS:
            raise SetupError(f"others may write to {path}: run 'chmod 700 {path}'")
        self.path = path

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """At most ``max_bytes`` + 1 bytes, for a parser to refuse what is too long; None if there is no such file."""
        try:
            return read_bounded(self.path / name, max_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SetupError(f"cannot read {self.path / name}: {error.strerror}") from error

    def age_ms(self, name: str, now_ms: int) -> int | None:
        """How long ago it was written."""
        try:
            return now_ms - (self.path / name).stat().st_mtime_ns // 1_000_000
        except OSError:
            return None

    def write(self, name: str, content: bytes, now_ms: int) -> None:
        """Replaces the file in one step. Raises :class:`SetupError` if there is no room, or no right to."""
        try:
            descriptor, draft = tempfile.mkstemp(prefix=".", suffix=".new", dir=self.path)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.utime(draft, ns=(now_ms * 1_000_000, now_ms * 1_000_000))
                os.replace(draft, self.path / name)
            except BaseException:
                os.unlink(draft)
                raise
        except OSError as error:
            raise SetupError(f"cannot write {self.path / name}: {error.strerror}") from error


def _chain_files(product: Product, kind: VekKind) -> tuple[str, str]:
    """As ``casemate attestation verify --roots`` expects them."""
    return f"{'ask' if kind == 'vcek' else 'asvk'}_{product.lower()}.der", f"ark_{product.lower()}.der"


def _chain_of_pem(body: bytes) -> tuple[bytes, bytes]:
    """Two PEM certificates, intermediate first."""
    try:
        blocks = _PEM.findall(body.decode("ascii"))
        if len(blocks) != 2:
            raise MalformedError(f"expected a chain of two PEM certificates, got {len(blocks)}")
        return ssl.PEM_cert_to_DER_cert(blocks[0]), ssl.PEM_cert_to_DER_cert(blocks[1])
    except ValueError as error:
        raise MalformedError("expected a chain of PEM certificates") from error
