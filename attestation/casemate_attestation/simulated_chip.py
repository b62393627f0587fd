"""A SIMULATED SEV-SNP chip, for machines without one. It proves nothing about the machine it runs on.

It signs reports that are byte-identical in form to a real chip's, under a hierarchy ARK → ASK → VCEK made for the
occasion; only a policy with ``simulation: true`` accepts them, and no such policy accepts AMD's. It runs as a process of its
own (``python -m casemate_attestation.simulated_chip --socket PATH --key-dir DIR``), so that neither gateway nor operator
programs hold its key. Each connection is one launch, measured as it is made. Worker images do not contain this file.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from casemate_schemas.attestation_policy import AcceptedProduct, FirmwareVersion
from casemate_schemas.codec import decode, encode, pack
from casemate_schemas.errors import CasemateError, SetupError
from casemate_schemas.evidence import SevSnp
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from .certificates import (
    CSP_ID,
    HARDWARE_ID,
    MAX_CERTIFICATE_BYTES,
    PRODUCT_NAME,
    SPL,
    SPL_FMC,
    SPL_RESERVED,
    STRUCT_VERSION,
    VekKind,
    parse_certificate,
    vek_profile,
)
from .guest import (
    DERIVED_KEY_BYTES,
    MAX_FRAME_BYTES,
    ChipKeyRequest,
    ChipKeyResponse,
    ChipRequest,
    ChipResponse,
    check_report_data,
)
from .policy_file import read_bounded
from .products import CHIP_ID_BYTES, CPUID, Product, TcbVersion, encode_tcb
from .report import ECDSA_P384_SHA384, AttestationReport, join_signature

WORKER_PACKAGES: Final = (
    "casemate_schemas",
    "casemate_attestation",
    "casemate_privacy",
    "casemate_models",
    "casemate_messaging",
    "casemate_worker",
)
"""The import packages that make up a worker image."""
KEY_BROKER_PACKAGES: Final = (
    "casemate_schemas",
    "casemate_attestation",
    "casemate_privacy",
    "casemate_messaging",
    "casemate_key_broker",
)
"""The import packages that make up the image of an enclave-hosted key broker."""
_LEFT_OUT: Final = "casemate_attestation/simulated_chip.py"

DEFAULT_TCB: Final = TcbVersion(bl=4, snp=24, ucode=219)
DEFAULT_FIRMWARE: Final[FirmwareVersion] = (1, 55, 29)
_GUEST_POLICY: Final = 1 << 17 | 1 << 16 | 1 << 8 | 51
"""The bit that is always one, SMT permitted, and a least ABI of 1.51."""
_PLATFORM_INFO: Final = 1 << 5 | 1 << 2 | 1
"""Alias check complete, ECC, SMT."""

_MAX_LAUNCHES: Final = 64
_PSS = padding.PSS(padding.MGF1(SHA384()), 48)
_log = logging.getLogger(__name__)


# --- the launch measurement -------------------------------------------------------------------------------------------


def measure_worker_image() -> bytes:
    """The launch measurement (48 bytes) of the worker that this installation would start: one changed line, another value.

    Raises :class:`SetupError` if a package of the image is not installed.
    """
    return measure_packages({name: _folder_of(name) for name in WORKER_PACKAGES})


def measure_key_broker_image() -> bytes:
    """The same of the key broker that it would start in an enclave. Raises :class:`SetupError` likewise."""
    return measure_packages({name: _folder_of(name) for name in KEY_BROKER_PACKAGES})


def measure_packages(folders: Mapping[str, Path]) -> bytes:
    """SHA-384 over the canonical list of (path below its package, SHA-384) of the packages' ``.py`` files."""
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    files.pop(_LEFT_OUT, None)
    measured = [(name, hashlib.sha384(files[name].read_bytes()).digest()) for name in sorted(files)]
    return hashlib.sha384(b"casemate simulated launch v1\0" + pack(measured)).digest()


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"expected the package {package} of the worker image to be installed")
    return Path(spec.submodule_search_locations[0])


# --- the key hierarchy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulatedKeys:
    """The RSA-4096 keys of a hierarchy. Making them takes seconds; names can be put on them many times."""

    ark: rsa.RSAPrivateKey
    ask: rsa.RSAPrivateKey

    @classmethod
    def generate(cls) -> Self:
        """Fresh keys."""
        return cls(rsa.generate_private_key(65537, 4096), rsa.generate_private_key(65537, 4096))


class SimulatedAuthority:
    """ARK and ASK (or ASVK) of one product, by AMD's certificate profiles, plainly named SIMULATED."""

    def __init__(self, keys: SimulatedKeys, product: Product = "Milan", kind: VekKind = "vcek") -> None:
        self.keys = keys
        self.product: Product = product
        self.kind: VekKind = kind
        self.ark_name = simulated_name(f"ARK-{product}")
        self.ask_name = simulated_name(f"SEV-{product}" if kind == "vcek" else f"SEV-VLEK-{product}")
        self.ark = self._authority(self.ark_name, keys.ark, 0x10000, path_length=None)
        self.ask = self._authority(self.ask_name, keys.ask, 0x10001, path_length=0)

    def issue_chip(self, tcb: TcbVersion = DEFAULT_TCB, version: int = 3) -> SimulatedChip:
        """A new chip of this product, with an id of its own, that writes reports of ``version``."""
        key = ec.generate_private_key(ec.SECP384R1())
        chip_id = secrets.token_bytes(CHIP_ID_BYTES[self.product])
        vek = self.issue_vek(key.public_key(), self.vek_extensions(tcb, chip_id))
        return SimulatedChip(key, (vek, self.ask, self.ark), version)

    def vek_extensions(self, tcb: TcbVersion, chip_id: bytes, csp_id: str = "SIMULATED") -> dict[str, bytes]:
        """AMD's extensions of a VCEK or VLEK, by OID."""
        name = f"{self.product}-B0" if self.product == "Milan" else self.product
        extensions = {STRUCT_VERSION: _integer(1), PRODUCT_NAME: _ia5(name)}
        extensions |= {oid: _integer(getattr(tcb, component)) for component, oid in SPL.items()}
        extensions |= {SPL_FMC: _integer(tcb.fmc)} if self.product == "Turin" else {}
        extensions |= {oid: _integer(0) for oid in SPL_RESERVED if self.product != "Turin"}
        return extensions | ({HARDWARE_ID: chip_id} if self.kind == "vcek" else {CSP_ID: _ia5(csp_id)})

    def issue_vek(
        self,
        public_key: ec.EllipticCurvePublicKey,
        extensions: Mapping[str, bytes],
        **changed: Any,
    ) -> bytes:
        """DER of a VEK certificate. ``changed`` replaces name, issuer, validity, hash or padding, for tests to break one."""
        now = datetime.now(UTC)
        digest = changed.get("digest", SHA384())
        builder = (
            x509.CertificateBuilder()
            .subject_name(simulated_name(changed.get("common_name", f"SEV-{self.kind.upper()}")))
            .issuer_name(changed.get("issuer", self.ask_name))
            .public_key(public_key)
            .serial_number(1)
            .not_valid_before(changed.get("not_before", now - timedelta(days=1)))
            .not_valid_after(changed.get("not_after", now + timedelta(days=7 * 365)))
        )
        for oid, value in extensions.items():
            builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False)
        signer = changed.get("signer", self.keys.ask)
        signed = builder.sign(signer, digest, rsa_padding=changed.get("padding", _PSS))
        return signed.public_bytes(serialization.Encoding.DER)

    def issue_crl(
        self,
        revoked: Iterable[int] = (),
        *,
        signer: rsa.RSAPrivateKey | None = None,
        expires_in: timedelta | None = None,
    ) -> bytes:
        """DER of a revocation list by the ARK that names these serial numbers."""
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.ark_name)
        builder = builder.last_update(now - timedelta(days=2)).next_update(now + (expires_in or timedelta(days=30)))
        for serial_number in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial_number).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        signed = builder.sign(signer or self.keys.ark, SHA384(), rsa_padding=_PSS)
        return signed.public_bytes(serialization.Encoding.DER)

    def _authority(
        self, name: x509.Name, key: rsa.RSAPrivateKey, serial_number: int, *, path_length: int | None
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.ark_name)
            .public_key(key.public_key())
            .serial_number(serial_number)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=25 * 365))
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage(crl_sign=path_length is None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if key is not self.keys.ark:
            authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys.ark.public_key())
            builder = builder.add_extension(authority_key, critical=False)
        signed = builder.sign(self.keys.ark, SHA384(), rsa_padding=_PSS)
        return signed.public_bytes(serialization.Encoding.DER)


def simulated_name(common_name: str) -> x509.Name:
    """A subject with the common name that the profile demands and, everywhere else, the word SIMULATED."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "SIMULATED hardware"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SIMULATED by Casemate, not AMD"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, crl_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _integer(value: int) -> bytes:
    return bytes((2, 1, value)) if value < 0x80 else bytes((2, 2, 0, value))


def _ia5(text: str) -> bytes:
    return bytes((0x16, len(text))) + text.encode("ascii")


# --- the chip ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulatedRoot:
    """What a manifest needs to know to accept a simulated chip, and nothing secret."""

    product: Product
    ark_sha256: bytes
    chip_id: bytes | None
    tcb: TcbVersion
    firmware: FirmwareVersion

    def accepted(self) -> AcceptedProduct:
        """This root as a manifest's policy lists it, with the chip's own TCB and firmware as floors."""
        return AcceptedProduct(
            product=self.product, ark_sha256=(self.ark_sha256,), min_tcb=self.tcb, min_firmware=self.firmware
        )


class SimulatedChip:
    """A VCEK (or VLEK) with its certificates. Its key does not show itself."""

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, certificates: tuple[bytes, bytes, bytes], version: int = 3
    ) -> None:
        self._key = key
        self.certificates = certificates
        self.version = version
        self.facts = vek_profile(parse_certificate(certificates[0]))

    @property
    def root(self) -> SimulatedRoot:
        """The public facts."""
        digest = hashlib.sha256(self.certificates[2]).digest()
        return SimulatedRoot(self.facts.product, digest, self.facts.hardware_id, self.facts.tcb, DEFAULT_FIRMWARE)

    def launch(self, measurement: bytes, host_data: bytes = bytes(32)) -> Launch:
        """Start a guest whose launch measurement is ``measurement`` (48 bytes)."""
        product, tcb = self.facts.product, encode_tcb(self.facts.tcb, self.facts.product)
        family, model = CPUID[product] if self.version >= 3 else (0, 0)
        template = AttestationReport(
            version=self.version,
            guest_svn=0,
            policy=_GUEST_POLICY,
            family_id=bytes(16),
            image_id=bytes(16),
            vmpl=0,
            signature_algorithm=ECDSA_P384_SHA384,
            current_tcb=tcb,
            platform_info=_PLATFORM_INFO,
            signer_info=(1 << 2) if self.facts.kind == "vlek" else 0,
            report_data=bytes(64),
            measurement=measurement,
            host_data=host_data,
            id_key_digest=bytes(48),
            author_key_digest=bytes(48),
            report_id=secrets.token_bytes(32),
            report_id_ma=b"\xff" * 32,
            reported_tcb=tcb,
            cpuid_family=family,
            cpuid_model=model,
            cpuid_stepping=1 if family else 0,
            chip_id=(self.facts.hardware_id or b"").ljust(64, b"\0"),
            committed_tcb=tcb,
            current_firmware=DEFAULT_FIRMWARE,
            committed_firmware=DEFAULT_FIRMWARE,
            launch_tcb=tcb,
            launch_mitigations=0b111111 if self.version >= 5 else 0,
            current_mitigations=0b111111 if self.version >= 5 else 0,
        )
        return Launch(self, template)

    def sign(self, body: bytes) -> bytes:
        """A whole report of the 0x2A0 bytes of ``body``."""
        r, s = decode_dss_signature(self._key.sign(body, ec.ECDSA(SHA384())))
        return join_signature(body, r, s)

    def derive_key(self, template: AttestationReport, context: bytes) -> bytes:
        """As a real chip would: from a secret of its own, the launch measurement and the guest policy."""
        secret = self._key.private_numbers().private_value.to_bytes(48, "big")
        info = pack(("casemate simulated derived key v1", template.measurement, template.policy, context))
        return HKDF(SHA256(), DERIVED_KEY_BYTES, salt=None, info=info).derive(secret)

    def save(self, folder: Path) -> None:
        """Write certificates and the chip's key, the latter for its owner's eyes only. ``folder`` must be private."""
        _require_private(folder)
        for name, der in zip(_CERTIFICATE_FILES, self.certificates, strict=True):
            (folder / name).write_bytes(der)
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        descriptor = os.open(folder / _KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The chip that :meth:`save` wrote. Raises :class:`SetupError` if it is not there, or not private."""
        _require_private(folder)
        try:
            key = serialization.load_pem_private_key(read_bounded(folder / _KEY_FILE, MAX_CERTIFICATE_BYTES), None)
            vek, ask, ark = (read_bounded(folder / name, MAX_CERTIFICATE_BYTES) for name in _CERTIFICATE_FILES)
        except (OSError, ValueError) as error:
            raise SetupError(f"expected a simulated chip's key and certificates in {folder}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SetupError(f"expected an elliptic curve key in {folder / _KEY_FILE}")
        return cls(key, (vek, ask, ark))


class Launch:
    """One launched guest: a :class:`~casemate_attestation.guest.KeyedGuest` inside the chip's own process."""

    def __init__(self, chip: SimulatedChip, template: AttestationReport) -> None:
        self._chip = chip
        self.template = template

    def attest(self, report_data: bytes) -> SevSnp:
        """A fresh report over ``report_data`` (64 bytes)."""
        check_report_data(report_data)
        body = replace(self.template, report_data=report_data).body()
        return SevSnp(report=self._chip.sign(body), certificates=self._chip.certificates)

    def derive_key(self, context: bytes) -> bytes:
        """See :meth:`~casemate_attestation.guest.KeySource.derive_key`."""
        return self._chip.derive_key(self.template, context)


_KEY_FILE: Final = "SIMULATED-vcek-key.pem"
_CERTIFICATE_FILES: Final = ("SIMULATED-vcek.der", "SIMULATED-ask.der", "SIMULATED-ark.der")


def create_hierarchy(folder: Path, product: Product = "Milan") -> SimulatedRoot:
    """Make a hierarchy and one chip under it, and write the chip to ``folder`` (made with mode 0700 if need be).

    The ARK's and ASK's private keys are forgotten, so nobody can make another chip. Takes seconds (two RSA-4096 keys).

    Raises: :class:`SetupError` if the folder is readable by others or holds a chip already.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    if (folder / _KEY_FILE).exists():
        raise SetupError(f"expected a folder without a simulated chip, but {folder} holds one")
    chip = SimulatedAuthority(SimulatedKeys.generate(), product).issue_chip()
    chip.save(folder)
    return chip.root


def _require_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise SetupError(f"expected {folder} to be this user's alone (chmod 700)")


# --- the process ------------------------------------------------------------------------------------------------------


class ChipServer:
    """The chip behind Unix sockets, one for each image that can be launched: one connection is one launch."""

    def __init__(self, chip: SimulatedChip, host_data: bytes) -> None:
        self._chip = chip
        self._host_data = host_data
        self._launches = 0

    async def serve(self, worker_socket: Path, key_broker_socket: Path | None = None) -> None:
        """Serve until SIGTERM or SIGINT. The sockets' folders must be private; the sockets go away at the end."""
        images = {worker_socket: measure_worker_image}
        if key_broker_socket is not None:
            images[key_broker_socket] = measure_key_broker_image
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        servers = [await self._listen(path, measure) for path, measure in images.items()]
        ready = {"level": "info", "program": "simulated-chip", "event": "ready", "simulation": True}
        print(json.dumps(ready), file=sys.stderr, flush=True)  # noqa: T201
        try:
            await stop.wait()
        finally:
            for server, path in zip(servers, images, strict=True):
                server.close()
                path.unlink(missing_ok=True)

    async def _listen(self, path: Path, measure: Callable[[], bytes]) -> asyncio.Server:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(path.parent)
        return await asyncio.start_unix_server(partial(self._launch, measure), path)

    async def _launch(
        self, measure: Callable[[], bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._launches += 1
        try:
            if self._launches <= _MAX_LAUNCHES:
                await self._answer(self._chip.launch(measure(), self._host_data), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            _log.debug("launch ended")  # by the guest, or by the end of this process
        except CasemateError as error:
            _log.warning("launch refused: %s", error.reason)
        finally:
            self._launches -= 1
            writer.close()

    async def _answer(self, launch: Launch, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while length := int.from_bytes(await reader.readexactly(4), "big"):
            if length > MAX_FRAME_BYTES:
                _log.warning("launch refused: frame too long")
                return
            request = decode(ChipRequest, await reader.readexactly(length), max_bytes=MAX_FRAME_BYTES)
            response = encode(_answer_of(launch, request))
            writer.write(len(response).to_bytes(4, "big") + response)
            await writer.drain()


def _answer_of(launch: Launch, request: ChipRequest) -> ChipResponse | ChipKeyResponse:
    if isinstance(request.body, ChipKeyRequest):
        return ChipKeyResponse(key=launch.derive_key(request.body.context))
    attested = launch.attest(request.body.report_data)
    return ChipResponse(report=attested.report, certificates=attested.certificates)


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m casemate_attestation.simulated_chip``."""
    parser = argparse.ArgumentParser(description="A SIMULATED SEV-SNP chip. It proves nothing about this machine.")
    parser.add_argument("--socket", type=Path, required=True, help="the Unix socket to serve, in a private folder")
    parser.add_argument("--key-broker-socket", type=Path, help="another, whose launches are hosted key brokers")
    parser.add_argument("--key-dir", type=Path, required=True, help="the folder that create_hierarchy wrote")
    parser.add_argument(
        "--host-data", type=bytes.fromhex, default=bytes(32), help="HOST_DATA of launches, 32 bytes in hex"
    )
    options = parser.parse_args(arguments)
    if len(options.host_data) != 32:
        parser.error("expected 32 bytes of host data")
    try:
        chip = SimulatedChip.load(options.key_dir)
        asyncio.run(ChipServer(chip, options.host_data).serve(options.socket, options.key_broker_socket))
    except (CasemateError, OSError) as error:
        raise SystemExit(f"simulated chip: {error}") from error


if __name__ == "__main__":
    main()
