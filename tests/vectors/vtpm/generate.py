"""Records quotes of a software TPM: ``PYTHONPATH=tests python tests/vectors/vtpm/generate.py``. Needs swtpm and tpm2-tools.

Keys are made anew on each run, so every byte of the two files but the registers changes.
"""

from __future__ import annotations

import json
from pathlib import Path

from casemate_attestation.guest_vtpm import ATTESTATION_KEY_HANDLE, QUOTED_REGISTERS
from casemate_attestation.tpm import Tpm, qualifying_data
from support.swtpm import software_tpm

REPORT_DATA = bytes(range(64))


def main() -> None:
    """Writes ``swtpm-rsassa.json`` and ``swtpm-rsapss.json`` beside this file."""
    for scheme in ("rsassa", "rsapss"):
        with software_tpm() as tpm:
            modulus = tpm.make_key(scheme).public_numbers().n
            tpm.extend(4, b"\x04" * 32)
            commands = Tpm(tpm.transport)
            values = commands.pcr_values(QUOTED_REGISTERS)
            quote, signature = commands.quote(ATTESTATION_KEY_HANDLE, qualifying_data(REPORT_DATA), QUOTED_REGISTERS)
        vector = {
            "modulus": f"{modulus:x}",
            "quote": quote.hex(),
            "signature": signature.hex(),
            "pcrs": [value.hex() for value in values],
        }
        Path(__file__).with_name(f"swtpm-{scheme}.json").write_text(json.dumps(vector, indent=1) + "\n")


if __name__ == "__main__":
    main()
