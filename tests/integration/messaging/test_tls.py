"""Programs and a nats-server that want to see each other's certificates before a word is said."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from casemate_messaging.accounts import User
from casemate_messaging.connection import connect
from casemate_messaging.server import EmbeddedServer, ServerTls, create_user_key
from casemate_messaging.settings import ProgramSettings
from casemate_messaging.setup import ensure_streams
from casemate_schemas.errors import SetupError, UnavailableError
from support.tls import Authority


@dataclass
class Site:
    """A server with TLS for both sides, and an authority that knows it and one that does not."""

    folder: Path
    server: EmbeddedServer
    seed: Path
    ours: Authority
    strangers: Authority

    def tls(self, ca: Authority | None = None, shown: Authority | None = None) -> ssl.SSLContext | None:
        """As a program's settings say it."""
        certificate, key = (shown or self.ours).issue("gateway")
        settings = ProgramSettings(
            nats_url=self.server.url,
            nats_seed_file=self.seed,
            nats_ca_file=(ca or self.ours).file,
            nats_certificate_file=certificate,
            nats_key_file=key,
            consortium="0" * 64,
            manifest_file=self.folder / "none",
        )
        return settings.nats_tls()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    seed = tmp_path / "gateway.nk"
    users = [User("gateway", "gateway", create_user_key(seed))]
    ours, strangers = Authority(tmp_path, "ours"), Authority(tmp_path, "strangers")
    tls = ServerTls(*ours.issue("server"), ours.file)
    async with EmbeddedServer(tmp_path / "nats", users, tls=tls) as server:
        yield Site(tmp_path, server, seed, ours, strangers)


async def test_who_shows_the_right_certificates_is_served(site: Site) -> None:
    assert site.server.url.startswith("tls://")
    client = await connect(site.server.url, site.seed, user="gateway", tls=site.tls())
    try:
        await ensure_streams(client.jetstream())
    finally:
        await client.close()


async def test_a_server_that_no_trusted_authority_knows_is_refused(site: Site) -> None:
    with pytest.raises(UnavailableError):
        await connect(site.server.url, site.seed, user="gateway", tls=site.tls(ca=site.strangers), timeout_s=1)


async def test_a_server_at_another_address_than_its_certificates_is_refused(site: Site, tmp_path: Path) -> None:
    elsewhere = ServerTls(*site.ours.issue("elsewhere", "127.0.0.9"), site.ours.file)
    users = [User("gateway", "gateway", create_user_key(tmp_path / "other.nk"))]
    async with EmbeddedServer(tmp_path / "other", users, tls=elsewhere) as server:
        with pytest.raises(UnavailableError):
            await connect(server.url, tmp_path / "other.nk", user="gateway", tls=site.tls(), timeout_s=1)


async def test_a_client_without_the_right_certificate_is_refused(site: Site) -> None:
    stranger = site.tls(shown=site.strangers)
    nobody = ssl.create_default_context(cafile=site.ours.file)
    for tls in (stranger, nobody):
        with pytest.raises(UnavailableError):
            await connect(site.server.url, site.seed, user="gateway", tls=tls, timeout_s=1)


async def test_nothing_goes_out_in_clear(site: Site) -> None:
    plain = site.server.url.replace("tls://", "nats://")
    with pytest.raises(SetupError, match="nothing would be encrypted"):
        await connect(plain, site.seed, user="gateway", tls=site.tls())
    with pytest.raises(UnavailableError):
        await connect(plain, site.seed, user="gateway", timeout_s=1)
    with pytest.raises(SetupError, match="all with tls"):
        await connect(f"{site.server.url},{plain}", site.seed, user="gateway", tls=site.tls())


def test_tls_files_are_checked_before_anything_is_connected(site: Site, tmp_path: Path) -> None:
    certificate, key = site.ours.issue("gateway")
    fields = {
        "nats_url": site.server.url,
        "nats_seed_file": site.seed,
        "consortium": "0" * 64,
        "manifest_file": tmp_path / "none",
    }
    key.chmod(0o644)
    wrong = (
        {"nats_certificate_file": certificate, "nats_key_file": key},
        {"nats_certificate_file": certificate},
        {"nats_ca_file": site.seed},
        {"nats_ca_file": tmp_path / "missing"},
    )
    for files in wrong:
        with pytest.raises(SetupError):
            ProgramSettings(**fields, **files).nats_tls()
    assert ProgramSettings(**fields).nats_tls() is None
