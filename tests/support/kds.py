"""A key distribution service for simulated chips, by the URL forms of AMD 57230: as a function, and behind real HTTPS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from casemate_attestation.kds import Roots
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedChip
from casemate_schemas.errors import NotFoundError, ThrottledError, TooLargeError, UnavailableError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_VCEK = re.compile(r"/vcek/v1/(Milan|Genoa|Turin)/([0-9a-f]{16}|[0-9a-f]{128})")
_OTHER = re.compile(r"/(vcek|vlek)/v1/(Milan|Genoa|Turin)/(cert_chain|crl)")


@dataclass
class Answer:
    """One HTTP answer. ``stall`` keeps the connection open without ever sending the rest."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stall: bool = False


class SimulatedKds:
    """Answers for some chips and their authorities. ``twist`` may replace any answer, to be hostile."""

    def __init__(self, *chips: tuple[SimulatedAuthority, SimulatedChip]) -> None:
        self.chips = chips
        self.requests: list[str] = []
        self.twist: Callable[[str, Answer], Answer] = lambda _, answer: answer
        self.crls = {authority.product: authority.issue_crl() for authority, _ in chips}

    @property
    def roots(self) -> Roots:
        """The roots of all its chips."""
        return {chip.facts.product: (chip.root.ark_sha256,) for _, chip in self.chips}

    def answer(self, target: str) -> Answer:
        """The answer to ``GET target``."""
        self.requests.append(target)
        return self.twist(target, self._true_answer(target))

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """As :class:`~casemate_attestation.https.HttpsFetch`, without a network."""
        parts = urlsplit(url)
        answer = self.answer(parts.path + (f"?{parts.query}" if parts.query else ""))
        if answer.status == 429:
            raise ThrottledError("wait", float(answer.headers["Retry-After"]))
        if answer.status == 404:
            raise NotFoundError("not here")
        if answer.status != 200:
            raise UnavailableError("not now")
        if len(answer.body) > max_bytes:
            raise TooLargeError("too large")
        return answer.body

    def _true_answer(self, target: str) -> Answer:
        parts = urlsplit(target)
        if found := _OTHER.fullmatch(parts.path):
            return self._authority_answer(*found.groups())
        if found := _VCEK.fullmatch(parts.path):
            levels = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
            for _, chip in self.chips:
                facts, names = chip.facts, ("blSPL", "teeSPL", "snpSPL", "ucodeSPL")
                wanted = dict(zip(names, (facts.tcb.bl, facts.tcb.tee, facts.tcb.snp, facts.tcb.ucode), strict=True))
                wanted |= {"fmcSPL": facts.tcb.fmc} if facts.product == "Turin" else {}
                if (facts.product, facts.hardware_id) == (found[1], bytes.fromhex(found[2])) and levels == wanted:
                    return Answer(body=chip.certificates[0])
        return Answer(404)

    def _authority_answer(self, kind: str, product: str, what: str) -> Answer:
        for authority, _ in self.chips:
            if (authority.kind, authority.product) == (kind, product):
                if what == "crl":
                    return Answer(body=self.crls[authority.product])
                return Answer(body="".join(map(ssl.DER_cert_to_PEM_cert, (authority.ask, authority.ark))).encode())
        return Answer(404)


@dataclass(frozen=True)
class Served:
    """A service on 127.0.0.1: where, and a context that trusts its certificate (which is also in ``ca_file``)."""

    url: str
    context: ssl.SSLContext
    ca_file: Path


@contextlib.contextmanager
def serve(kds: SimulatedKds, folder: Path) -> Iterator[Served]:
    """``kds`` behind HTTPS, until the block ends."""
    ca_file, key_file = _server_certificate(folder)
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = kds.answer(self.path)
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body[:1] if answer.stall else answer.body)
            if answer.stall:
                self.wfile.flush()
                ended.wait(30)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        trusting = ssl.create_default_context(cafile=str(ca_file))
        yield Served(f"https://127.0.0.1:{server.server_port}", trusting, ca_file)
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _server_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    ca_file, key_file = folder / "kds-ca.pem", folder / "kds-key.pem"
    ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca_file, key_file
