"""A job on the data of two hospitals, one of whose key brokers runs in an enclave: the same road, and no key on the host."""

from __future__ import annotations

import pytest
from casemate_attestation.simulated_chip import measure_key_broker_image
from casemate_key_broker.sealed_database import FILE_NAME
from support.road import SCIENTIST, Road, ended, request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_job_over_a_hosted_and_a_member_run_key_broker(road: Road) -> None:
    datasets = await road.push("both-kinds", "east", "north")
    async with road.connected(SCIENTIST) as consortium:
        hosted = {broker.id: broker.hosted for broker in consortium.manifest.key_brokers}
        assert (hosted["east"], hosted["north"]) == ("enclave", "member")
        attested = await consortium.attest_key_broker("east")
        claims = attested.verdict.claims
        assert claims is not None and claims.simulated and claims.report.measurement == measure_key_broker_image()
        job = await consortium.train(**request(datasets))
        assert (await ended(job)).state == "sealed"
        result = await job.result()
    assert {owner.dataset for owner in result.privacy.owners} == set(datasets)
    assert await road.charged(datasets) == [[job.id], [job.id]]


async def test_the_host_of_an_enclave_holds_ciphertext_only(road: Road) -> None:
    host, owner = road.layout.key_broker("east", hosted=True), road.layout.member("east")
    files = {path.relative_to(host).as_posix() for path in host.rglob("*") if path.is_file()}
    state = {f"key-broker/{name}" for name in (FILE_NAME, "lock", "manifests")}
    assert files == {"nats.seed", "settings.toml", *state}
    assert not any("key-broker" in path.name for path in owner.iterdir())
    assert b"SQLite" not in (host / "key-broker" / FILE_NAME).read_bytes()
