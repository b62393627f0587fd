"""Which streams answer before the disk has it: those whose loss is made up for, and no others."""

from __future__ import annotations

from casemate_messaging.setup import StreamSettings, stream_configs
from casemate_schemas import subjects
from nats.js.api import PersistMode, StorageType

WORK = {subjects.work_stream(resource_class) for resource_class in subjects.RESOURCE_CLASSES}


def test_one_server_syncs_all_but_nonces_and_the_queue() -> None:
    modes = {config.name: (config.storage, config.persist_mode) for config in stream_configs(StreamSettings())}
    asynchronous = {name for name, (_, mode) in modes.items() if mode is PersistMode.ASYNC}
    assert asynchronous == WORK | {subjects.NONCE_STREAM}
    assert {storage for storage, _ in modes.values()} == {StorageType.FILE}


def test_a_cluster_keeps_nonces_alone_in_memory() -> None:
    configs = stream_configs(StreamSettings(replicas=3))
    assert {config.name for config in configs if config.storage is StorageType.MEMORY} == {subjects.NONCE_STREAM}
    assert {config.persist_mode for config in configs} == {None}
