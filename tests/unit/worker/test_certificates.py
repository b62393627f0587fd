"""Where a worker's certificates come from when its host hands out none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.https import HttpsFetch
from casemate_schemas.errors import SetupError
from casemate_worker.__main__ import certificate_source
from casemate_worker.settings import Settings
from support.kds import SimulatedKds
from support.key_brokers import Bench, authority, chip


def settings(folder: Path, **changed: Any) -> Settings:
    fields: dict[str, Any] = {
        "name": "worker-1",
        "nats_url": "nats://127.0.0.1:4222",
        "nats_seed_file": folder / "seed",
        "consortium": "ab" * 32,
        "manifest_file": folder / "manifest",
        "scratch_dir": folder,
    }
    return Settings(**(fields | changed))


def test_by_default_the_host_is_expected_to_hand_them_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert certificate_source(settings(tmp_path), bench.consortium) is None
    with pytest.raises(SetupError, match="kds_cache_dir"):
        certificate_source(settings(tmp_path, kds="online"), bench.consortium)


def test_from_the_service_once_and_from_the_folder_ever_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, kds = Bench(tmp_path), SimulatedKds((authority(), chip()))
    asked: list[str] = []

    def fetch(_: HttpsFetch, url: str, max_bytes: int) -> bytes:
        asked.append(url)
        return kds.fetch(url, max_bytes)

    monkeypatch.setattr(HttpsFetch, "__call__", fetch)
    report = chip().launch(bytes(48)).attest(bytes(64)).report
    folder = {"kds_cache_dir": tmp_path / "kds", "kds_url": "https://mirror.example", "kds_interval_s": 0.0}
    offline = certificate_source(settings(tmp_path, **folder), bench.consortium)
    online = certificate_source(settings(tmp_path, **folder, kds="online"), bench.consortium)
    assert offline is not None and online is not None
    with pytest.raises(SetupError, match="casemate attestation fetch"):
        offline(report)
    assert asked == []
    assert online(report) == offline(report) == chip().certificates
    assert [url.startswith("https://mirror.example/vcek/v1/Milan/") for url in asked] == [True, True]


@pytest.mark.parametrize("url", ["http://kds.example", "https://a b", "https://user@host", "https://h/?q", "ftp://h"])
def test_a_service_is_an_https_url(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="kds_url"):
        settings(tmp_path, kds_url=url)
