"""The JSON policy file of ``casemate attestation verify --policy``, and the folder of roots beside it.

The format is defined in ``docs/attestation.md``. Bytes are hex; unknown keys are refused.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Self

from casemate_schemas.attestation_policy import (
    AMD_ROOTS,
    AcceptedProduct,
    AppraisalPolicy,
    Byte,
    CspId,
    FirmwareVersion,
    GuestPolicyRules,
    PlatformRules,
    Product,
    TcbVersion,
    Word,
)
from casemate_schemas.errors import MalformedError, SetupError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .appraise import appraise
from .certificates import MAX_CERTIFICATE_BYTES, Certificate, parse_certificate
from .products import PRODUCTS
from .verdict import Verdict
from .verify import verify

MAX_POLICY_BYTES: Final = 1 << 20
_MAX_ROOT_FILES: Final = 64


def _hex(size: int) -> StringConstraints:
    return StringConstraints(pattern=rf"^[0-9a-f]{{{2 * size}}}$")


Hex16 = Annotated[str, _hex(16)]
Hex32 = Annotated[str, _hex(32)]
Hex48 = Annotated[str, _hex(48)]
Hex64 = Annotated[str, _hex(64)]
HexChip = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16}|[0-9a-f]{128})$")]
Listed = Field(min_length=1, max_length=64)


class PolicyFile(BaseModel):
    """What to appraise a report against. An absent key asks for nothing, save where a default is given."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    measurements: Annotated[tuple[Hex48, ...], Listed] | None = None
    report_data: Hex64 | None = None
    host_data: Hex32 | None = None
    id_keys: Annotated[tuple[Hex48, ...], Listed] | None = None
    author_keys: Annotated[tuple[Hex48, ...], Listed] | None = None
    family_id: Hex16 | None = None
    image_id: Hex16 | None = None
    min_version: Annotated[int, Field(ge=2, le=5)] = 2
    min_guest_svn: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    min_tcb: TcbVersion = TcbVersion()
    min_fw: tuple[Byte, Byte, Byte] = (0, 0, 0)
    vmpl: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1, max_length=4)] = (0,)
    guest_policy: GuestPolicyRules = GuestPolicyRules()
    platform: PlatformRules = PlatformRules()
    provisional: bool = False
    mit_launch: Word = 0
    mit_current: Word = 0
    chip_ids: Annotated[tuple[HexChip, ...], Listed] | None = None
    csp_ids: Annotated[tuple[CspId, ...], Listed] | None = None
    crl_required: bool = False
    max_crl_age_s: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None

    @classmethod
    def parse(cls, data: bytes | str) -> Self:
        """The policy in JSON ``data``. Raises :class:`MalformedError` that names the field at fault."""
        if len(data) > MAX_POLICY_BYTES:
            raise MalformedError(f"expected a policy of at most {MAX_POLICY_BYTES} bytes, got {len(data)}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "policy"
            raise MalformedError(f"not a policy file: {where}: {first['msg']}") from error

    @property
    def is_empty(self) -> bool:
        """Whether no key was given: such a policy asks for authenticity alone."""
        return not self.model_fields_set

    def expected_report_data(self) -> bytes | None:
        """The 64 bytes that the report must carry, if any."""
        return None if self.report_data is None else bytes.fromhex(self.report_data)

    def under(self, roots: TrustedRoots) -> AppraisalPolicy:
        """This policy for evidence under ``roots``; every product there gets the same floors."""
        return AppraisalPolicy(
            simulation=not roots.are_amds,
            products=roots.accepted(self.min_tcb, self.min_fw),
            min_report_version=self.min_version,
            measurements=_all_bytes(self.measurements),
            host_data=_bytes(self.host_data),
            id_keys=_all_bytes(self.id_keys),
            author_keys=_all_bytes(self.author_keys),
            family_id=_bytes(self.family_id),
            image_id=_bytes(self.image_id),
            min_guest_svn=self.min_guest_svn,
            vmpl=self.vmpl,
            guest_policy=self.guest_policy,
            platform=self.platform,
            provisional=self.provisional,
            launch_mitigations=self.mit_launch,
            current_mitigations=self.mit_current,
            chip_ids=_all_bytes(self.chip_ids),
            csp_ids=self.csp_ids or (),
            crl_required=self.crl_required,
            max_crl_age_s=self.max_crl_age_s,
        )


class TrustedRoots:
    """A folder of ``ark_*.der``, ``ask_*.der`` and ``asvk_*.der``: what its owner chose to trust."""

    def __init__(self, arks: dict[Product, Certificate], intermediates: tuple[Certificate, ...]) -> None:
        self._arks = arks
        self._intermediates = intermediates
        amds = [hashlib.sha256(ark.der).digest() in AMD_ROOTS for ark in arks.values()]
        if not amds or not intermediates:
            raise SetupError("expected ark_*.der and ask_*.der or asvk_*.der in the folder of roots")
        if any(amds) != all(amds):
            raise SetupError("expected either AMD's roots or others in a folder, not both: nothing may accept both")
        self.are_amds = all(amds)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder. Raises :class:`SetupError` or :class:`MalformedError` for one that cannot be used."""
        arks: dict[Product, Certificate] = {}
        for ark in _read_all(folder, "ark_*.der"):
            product = next((p for p in PRODUCTS if ark.common_name == f"ARK-{p}"), None)
            if product is None or product in arks:
                raise SetupError(f"expected one ARK each of {', '.join(PRODUCTS)}, got {ark.common_name!r}")
            arks[product] = ark
        return cls(arks, (*_read_all(folder, "ask_*.der"), *_read_all(folder, "asvk_*.der")))

    def accepted(self, min_tcb: TcbVersion, min_firmware: FirmwareVersion) -> tuple[AcceptedProduct, ...]:
        """The products whose roots are here, each pinned by SHA-256."""
        return tuple(
            AcceptedProduct(
                product=product,
                ark_sha256=(hashlib.sha256(ark.der).digest(),),
                min_tcb=min_tcb,
                min_firmware=min_firmware,
            )
            for product, ark in self._arks.items()
        )

    def certificates_for(self, vek: bytes) -> tuple[bytes, bytes, bytes]:
        """``vek``, and the intermediate and ARK that it names (if they are not here, others, for verification to refuse)."""
        try:
            issuer = parse_certificate(vek).issuer
        except MalformedError:
            issuer = b""
        intermediate = next((c for c in self._intermediates if c.subject == issuer), self._intermediates[0])
        arks = tuple(self._arks.values())
        ark = next((c for c in arks if c.subject == intermediate.issuer), arks[0])
        return vek, intermediate.der, ark.der


def inspect_report(
    report: bytes, vek: bytes, roots: TrustedRoots, policy: PolicyFile, now: datetime, crl: bytes | None = None
) -> Verdict:
    """Verify ``report`` under ``roots`` and, if it is genuine and ``policy`` is not empty, appraise it.

    For people who inspect one report. A relying party calls
    :func:`~casemate_attestation.appraise.verify_and_appraise`, which always demands measurement and report data.
    """
    appraisal_policy = policy.under(roots)
    verified = verify(report, roots.certificates_for(vek), appraisal_policy, now, crl)
    if verified.claims is None or policy.is_empty:
        return verified
    appraised = appraise(verified.claims, appraisal_policy, policy.expected_report_data())
    return Verdict(verified.checks + appraised.checks, appraised.claims)


def _read_all(folder: Path, pattern: str) -> tuple[Certificate, ...]:
    paths = sorted(folder.glob(pattern))
    if len(paths) > _MAX_ROOT_FILES:
        raise SetupError(f"expected at most {_MAX_ROOT_FILES} files {pattern}, got {len(paths)}")
    return tuple(parse_certificate(read_bounded(path, MAX_CERTIFICATE_BYTES)) for path in paths)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """At most ``max_bytes`` + 1 bytes of a file, so that whoever parses them can tell that it is too long."""
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def _all_bytes(texts: tuple[str, ...] | None) -> tuple[bytes, ...]:
    return tuple(map(bytes.fromhex, texts or ()))
