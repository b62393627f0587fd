"""Whether certificates and their keys are good for what they stand for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from casemate_messaging.files import check_private, read_file
from casemate_schemas.errors import SetupError
from cryptography import x509

from .findings import Finding

_MAX_PEM_BYTES: Final = 1 << 20
_SOON: Final = timedelta(days=7)


def check_key(about: str, check: str, path: Path) -> Finding:
    """That only its owner can read a secret file."""
    try:
        check_private(path)
    except SetupError as error:
        if not path.exists():
            return Finding(about, check, f"no file {path}", "the file that the settings name", f"put it at {path}")
        return Finding(about, check, str(error), "mode 600", f"chmod 600 {path}")
    return Finding(about, check, "readable by its owner alone")


def check_certificate(about: str, check: str, path: Path, *, hosts: tuple[str, ...] = ()) -> Iterator[Finding]:
    """That certificates are valid today, and the first one for each of ``hosts``."""
    try:
        certificates = x509.load_pem_x509_certificates(read_file(path, _MAX_PEM_BYTES))
    except (SetupError, ValueError):
        yield Finding(about, check, f"no certificate in {path}", "a PEM certificate", f"put one at {path}")
        return
    now = datetime.now(UTC)
    end = min(certificate.not_valid_after_utc for certificate in certificates)
    begin = max(certificate.not_valid_before_utc for certificate in certificates)
    if end < now + _SOON or begin > now:
        valid = f"valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
        yield Finding(about, check, valid, "valid now and for a week more", f"renew {path}")
    else:
        yield Finding(about, check, f"valid to {end:%Y-%m-%d}")
    names = _names(certificates[0])
    for host in hosts:
        if not any(_covers(name, host) for name in names):
            said = f"a certificate for {', '.join(sorted(names)) or 'nobody'}"
            fix = f"issue {path} again with the subject alternative name {host}"
            yield Finding(about, f"{check} for {host}", said, f"one for {host}", fix)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, whoever looks."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    return addresses | {name.lower() for name in names.get_values_for_type(x509.DNSName)}


def _covers(name: str, host: str) -> bool:
    """RFC 6125, section 6.4.3: a wildcard stands for the whole first label."""
    host = host.lower().strip("[]")
    if name.startswith("*."):
        return host.partition(".")[2] == name[2:]
    return name == host
