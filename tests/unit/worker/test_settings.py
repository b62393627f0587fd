from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_attestation.guest import ConfigfsGuest
from casemate_attestation.guest_sev import SevGuest
from casemate_attestation.guest_vtpm import AzureGuest
from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AcceptedProduct, AppraisalPolicy
from casemate_schemas.errors import SetupError
from casemate_worker.__main__ import guest_driver
from casemate_worker.settings import Settings

GOOD = f"""
name = "worker-1"
nats_url = "nats://127.0.0.1:4222"
nats_seed_file = "worker-1.nk"
consortium = "{"ab" * 32}"
manifest_file = "consortium.manifest"
scratch_dir = "/tmp"
"""


def test_the_environment_wins_and_simulation_is_never_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + "threads = 2\n")
    assert (Settings.load(path).threads, Settings.load(path).guest) == (2, "configfs")
    monkeypatch.setenv("CASEMATE_WORKER_THREADS", "4")
    assert Settings.load(path).threads == 4


@pytest.mark.parametrize("wrong", ["threads = 0", "heartbeat_s = nan", 'guest = "none"', "surprise = 1"])
def test_wrong_settings_say_which_and_not_what(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + wrong)
    with pytest.raises(SetupError, match=wrong.split()[0]):
        Settings.load(path)


CONSORTIUM: Any = SimpleNamespace(
    manifest=SimpleNamespace(
        simulation=False,
        attestation=AppraisalPolicy(
            simulation=False, products=(AcceptedProduct(product="Milan", ark_sha256=(AMD_ARK_SHA256["Milan"],)),)
        ),
    )
)


@pytest.mark.parametrize(
    ("more", "driver"),
    [
        ("", ConfigfsGuest),
        ('guest = "sev-guest"\nvmpl = 2', SevGuest),
        ('guest = "azure-vtpm"\nkds_cache_dir = "{folder}"', AzureGuest),
    ],
)
def test_each_guest_has_its_driver(tmp_path: Path, more: str, driver: type) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + more.format(folder=tmp_path / "kds"))
    assert isinstance(guest_driver(Settings.load(path), CONSORTIUM), driver)


def test_the_privilege_level_goes_into_the_request(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + 'guest = "sev-guest"\nvmpl = 3')
    driver = guest_driver(Settings.load(path), CONSORTIUM)
    assert isinstance(driver, SevGuest) and driver.vmpl == 3


@pytest.mark.parametrize(
    ("more", "words"), [('guest = "simulated"', "disagree"), ('guest = "azure-vtpm"', "kds_cache_dir")]
)
def test_guests_that_cannot_be(tmp_path: Path, more: str, words: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + more)
    with pytest.raises(SetupError, match=words):
        guest_driver(Settings.load(path), CONSORTIUM)
