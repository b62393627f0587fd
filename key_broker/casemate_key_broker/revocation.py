"""Which revocation list a worker's evidence is checked against, and how it stays fresh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from casemate_attestation.certificates import VekKind
from casemate_attestation.https import HttpsFetch
from casemate_attestation.kds import KdsClient, KdsLimits, roots_of
from casemate_attestation.products import Product
from casemate_attestation.report import AttestationReport
from casemate_messaging.logs import ProgramLog
from casemate_schemas.attestation_policy import PROCESSOR_TYPES, AppraisalPolicy
from casemate_schemas.errors import CasemateError, MalformedError, SetupError, ThrottledError
from casemate_schemas.evidence import Evidence

from .settings import Settings

_RETRY_S: Final = 60.0

ListName = tuple[Product, VekKind]
"""The ARK's list for the chains of one kind of key: ASK and ASVK are revoked by different ones."""


def lists_for(policy: AppraisalPolicy) -> tuple[ListName, ...]:
    """The lists that evidence under ``policy`` can need: none of a kind of key whose every holder it leaves out."""
    is_open = not policy.chip_ids and not policy.csp_ids
    wanted: dict[VekKind, bool] = {"vcek": is_open or bool(policy.chip_ids), "vlek": is_open or bool(policy.csp_ids)}
    return tuple((accepted.product, kind) for accepted in policy.products for kind in wanted if wanted[kind])


class RevocationLists:
    """The lists in the key broker's folder, fetched into it from time to time; or none at all, where there is no folder."""

    def __init__(self, kds: KdsClient | None, *, refresh_s: float) -> None:
        self._kds = kds
        self._refresh_s = refresh_s

    @classmethod
    def of(cls, settings: Settings, policy: AppraisalPolicy) -> RevocationLists:
        """As the settings say, for the roots of ``policy``. Raises :class:`SetupError`."""
        if settings.kds_cache_dir is None:
            if settings.kds == "online":
                raise SetupError("setting kds: online needs 'kds_cache_dir'")
            return cls(None, refresh_s=settings.crl_refresh_s)
        kds = KdsClient(
            settings.kds_cache_dir,
            roots_of(policy),
            fetch=HttpsFetch() if settings.kds == "online" else None,
            base_url=settings.kds_url,
            limits=KdsLimits(interval_s=settings.kds_interval_s, max_wait_s=0.0, crl_max_age_s=settings.crl_max_age_s),
        )
        return cls(kds, refresh_s=settings.crl_refresh_s)

    def for_evidence(self, evidence: Evidence) -> bytes | None:
        """The list (DER) of the root that the evidence names, for the kind of key that its report names. Asks nobody.

        None where this key broker keeps no lists. Empty, which no verification passes, for a root that it keeps none for:
        one that is not accepted, or (in simulation) that a newer manifest brought, until the program starts anew.
        Raises :class:`UnavailableError` where a list is kept but none is fresh and current: no keys without one.
        """
        if self._kds is None:
            return None
        for component in evidence.components:
            if component.type in PROCESSOR_TYPES and (product := self._kds.product_of(component.certificates[2])):
                return self._kds.cached_crl(product, _kind_of(component.report))
        return b""

    async def keep_fresh(self, needed: Callable[[], Iterable[ListName]], log: ProgramLog) -> None:
        """Fetches each list now and every ``crl_refresh_s``, until cancelled. Returns at once if offline."""
        if self._kds is None or not self._kds.online:
            return
        clock = asyncio.get_running_loop().time
        due: dict[ListName, float] = {}
        while True:
            due = {name: due.get(name, 0.0) for name in needed()}
            for name, at in due.items():
                if at <= clock():
                    due[name] = clock() + await self._refresh(self._kds, name, log)
            await asyncio.sleep(min(_RETRY_S, max(0.0, min(due.values()) - clock())))

    async def _refresh(self, kds: KdsClient, name: ListName, log: ProgramLog) -> float:
        """Tries once. Seconds until the next try."""
        product, kind = name
        try:
            await asyncio.to_thread(kds.refresh_crl, product, kind)
        except ThrottledError as error:
            return error.retry_after_s
        except CasemateError as error:
            what = type(error).__name__
            log.warning("revocation_list_not_fetched", product=product, kind=kind, reason=error.reason, error=what)
            return _RETRY_S
        log.info("revocation_list_fetched", product=product, kind=kind)
        return self._refresh_s


def _kind_of(report: bytes) -> VekKind:
    """What the report says; verification refuses one that another kind of key signed."""
    try:
        return AttestationReport.parse(report).signing_key or "vcek"
    except MalformedError:
        return "vcek"
