"""Which revocation list a worker's evidence is checked against, and how it stays fresh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from casemate_attestation.https import HttpsFetch
from casemate_attestation.kds import KdsClient, KdsLimits, roots_of
from casemate_attestation.products import Product
from casemate_messaging.logs import ProgramLog
from casemate_schemas.attestation_policy import PROCESSOR_TYPES, AppraisalPolicy
from casemate_schemas.errors import CasemateError, SetupError, ThrottledError
from casemate_schemas.evidence import Evidence

from .settings import Settings

_RETRY_S: Final = 60.0


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
        """The list (DER) of the root that the evidence names. Asks nobody.

        None where this key broker keeps no lists, and for a root that is not accepted, which verification refuses.
        Raises :class:`UnavailableError` where a list is kept but none is fresh and current: no keys without one.
        """
        if self._kds is None:
            return None
        for component in evidence.components:
            if component.type in PROCESSOR_TYPES and (product := self._kds.product_of(component.certificates[2])):
                return self._kds.cached_crl(product)
        return None

    async def keep_fresh(self, products: Callable[[], Iterable[Product]], log: ProgramLog) -> None:
        """Fetches each product's list now and every ``crl_refresh_s``, until cancelled. Returns at once if offline."""
        if self._kds is None or not self._kds.online:
            return
        clock = asyncio.get_running_loop().time
        due: dict[Product, float] = {}
        while True:
            for product in products():
                if due.get(product, 0.0) <= clock():
                    due[product] = clock() + await self._refresh(self._kds, product, log)
            await asyncio.sleep(min(_RETRY_S, max(0.0, min(due.values()) - clock())))

    async def _refresh(self, kds: KdsClient, product: Product, log: ProgramLog) -> float:
        """Tries once. Seconds until the next try."""
        try:
            await asyncio.to_thread(kds.refresh_crl, product)
        except ThrottledError as error:
            return error.retry_after_s
        except CasemateError as error:
            log.warning("revocation_list_not_fetched", product=product, reason=error.reason, error=type(error).__name__)
            return _RETRY_S
        log.info("revocation_list_fetched", product=product)
        return self._refresh_s
