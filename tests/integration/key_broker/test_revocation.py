"""The program fetches revocation lists over HTTPS while it serves, and ends cleanly with that going on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from support.kds import SimulatedKds, serve
from support.key_broker_process import KeyBrokerProcess
from support.key_brokers import Bench, authority, chip
from support.nats import NatsStack


async def test_a_list_is_fetched_in_the_background(nats_stack: NatsStack, tmp_path: Path) -> None:
    process = KeyBrokerProcess(Bench(tmp_path), "north", nats_stack.url, nats_stack.seeds["north"])
    kds, folder = SimulatedKds((authority(), chip())), tmp_path / "kds"
    with serve(kds, tmp_path) as served:
        own = {"kds": "online", "kds_cache_dir": str(folder), "kds_url": served.url, "kds_interval_s": 0.0}
        with process.settings_file.open("a") as file:
            file.write("".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items()))
        await process.start(SSL_CERT_FILE=str(served.ca_file))
        try:
            async with asyncio.timeout(30):
                while not any(str(event["event"]).startswith("revocation_list") for event in process.events):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)  # the program says so in its log, and nowhere else
            fetched = [(e["product"], e["event"]) for e in process.events if "product" in e]
            assert fetched == [("Milan", "revocation_list_fetched")]
            assert (folder / "crl_milan.der").read_bytes() == kds.crls["Milan"]
            assert await process.stop() == 0
        finally:
            await process.kill()
