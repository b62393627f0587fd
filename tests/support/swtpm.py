"""A software TPM (swtpm) that looks as an Azure guest's does: attestation key, paravisor's report, measured registers."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from casemate_attestation.guest_vtpm import ATTESTATION_KEY_HANDLE, HCL_REPORT_NV_INDEX
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

PROGRAMS = ("swtpm", "tpm2_createprimary", "tpm2_evictcontrol", "tpm2_nvdefine", "tpm2_nvwrite", "tpm2_pcrextend")
MISSING = tuple(name for name in PROGRAMS if shutil.which(name) is None)
"""The programs that are not installed here; tests that need them skip."""

_READY_S = 10


class SoftwareTpm:
    """One running TPM."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._connection: socket.socket | None = None

    def transport(self, command: bytes) -> bytes:
        """One command to it, by its Unix socket."""
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(_READY_S)
            self._connection.connect(str(self._folder / "tpm"))
        self._connection.sendall(command)
        return self._connection.recv(4097)

    def close(self) -> None:
        """Hang up; it serves one connection at a time."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def make_key(self, scheme: str = "rsassa") -> rsa.RSAPublicKey:
        """A restricted signing key at the attestation key's handle; its public half."""
        context, public = self._folder / "ak.ctx", self._folder / "ak.pem"
        attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
        self._run("createprimary", "-C", "e", "-g", "sha256", "-G", f"rsa2048:{scheme}-sha256:null", "-a", attributes,
                  "-c", str(context), "-f", "pem", "-o", str(public))  # fmt: skip
        self._run("evictcontrol", "-C", "o", "-c", str(context), hex(ATTESTATION_KEY_HANDLE))
        key = load_pem_public_key(public.read_bytes())
        if not isinstance(key, rsa.RSAPublicKey):
            raise TypeError("expected an RSA key")
        return key

    def write_report(self, blob: bytes) -> None:
        """Put a paravisor's report where Azure's is."""
        path = self._folder / "report"
        path.write_bytes(blob)
        index = hex(HCL_REPORT_NV_INDEX)
        self._run("nvdefine", "-C", "o", "-s", str(len(blob)), "-a", "ownerread|ownerwrite", index)
        self._run("nvwrite", "-C", "o", "-i", str(path), index)

    def extend(self, register: int, digest: bytes) -> None:
        """Measure something into a register of the SHA-256 bank."""
        self._run("pcrextend", f"{register}:sha256={digest.hex()}")

    def _run(self, tool: str, *arguments: str) -> None:
        self.close()
        environment: Mapping[str, str] = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={self._folder / 'tpm'}"}
        subprocess.run([f"tpm2_{tool}", *arguments], check=True, capture_output=True, env=environment, timeout=_READY_S)


@contextmanager
def software_tpm() -> Iterator[SoftwareTpm]:
    """A fresh TPM that ends with the context. Unix socket paths are short, so it lives in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="tpm-") as name:
        folder = Path(name)
        server, control = (f"type=unixio,path={folder / path}" for path in ("tpm", "tpm.ctrl"))
        os.mkfifo(folder / "pid")
        started = os.open(folder / "pid", os.O_RDONLY | os.O_NONBLOCK)
        command = ["swtpm", "socket", "--tpm2", "--server", server, "--ctrl", control, "--tpmstate", f"dir={folder}",
                   "--flags", "not-need-init,startup-clear", "--log", f"file={folder / 'log'}",
                   "--pid", f"file={folder / 'pid'}"]  # fmt: skip
        with subprocess.Popen(command) as process, os.fdopen(started, "rb") as pid:
            tpm = SoftwareTpm(folder)
            try:
                if not select.select([pid], [], [], _READY_S)[0]:  # written once both sockets are there
                    raise TimeoutError("the software TPM did not start")
                yield tpm
            finally:
                tpm.close()
                process.kill()
