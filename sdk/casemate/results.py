"""A verified result: weights, privacy statement, provenance, and its bundle on disk."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from casemate_messaging.files import read_file
from casemate_schemas.audit import AuditReport
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import MAX_CHAIN_BYTES, ManifestChain
from casemate_schemas.errors import MissingExtraError, SetupError
from casemate_schemas.grant import Grant
from casemate_schemas.metrics import MetricSums
from casemate_schemas.model import MAX_NODES
from casemate_schemas.result import PrivacyStatement, Release, ResultManifest
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import Terms

from ._http import printable
from .datasets import SIMULATED
from .identity import Identity
from .verification import MAX_RESULT_BYTES, Bundle, Expected, Verification, VerifiedResult, verify_result

if TYPE_CHECKING:
    import torch
    from casemate_privacy.recorded import RecordedEvents

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_RELEASE_BYTES: Final = 2 << 20


@dataclass(frozen=True)
class Result:
    """Weights whose provenance holds. ``verification`` says what was checked, and by whose word."""

    verification: Verification
    manifest: ResultManifest
    terms: Terms
    arrays: dict[str, Array] = field(repr=False)
    """The weights as NumPy arrays, by their names in the model's ``state_dict``."""
    bundle: Bundle = field(repr=False)

    @property
    def job_id(self) -> str:
        """The job that made it."""
        return self.manifest.job_id

    @property
    def privacy(self) -> PrivacyStatement:
        """The guarantee for each owner's records, and for a person in several owners' data."""
        return self.manifest.privacy

    @property
    def metrics(self) -> MetricSums | None:
        """Accuracy and mean loss on the training records, each with its error bar, if the job was to release them.

        They are noisy sums, charged together with the weights, and say nothing about other data.
        """
        return self.manifest.metrics

    @property
    def audit(self) -> AuditReport | None:
        """Lower bounds on epsilon beside the guaranteed one, if the job was an audit; there are no weights then."""
        return self.manifest.audit

    @property
    def simulation(self) -> bool:
        """Whether the chips that vouch for it are simulated."""
        return self.verification.simulation

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights as tensors, for ``net.load_state_dict(result.weights)``. Raises :class:`MissingExtraError`."""
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("result.weights needs torch; result.arrays are the same as NumPy arrays") from error
        return {name: torch.from_numpy(array.copy()) for name, array in self.arrays.items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``weights.safetensors``, ``provenance.json``, and the bundle that :func:`load` verifies again.

        The weights are in clear: the folder is made for its owner's eyes only. Raises :class:`SetupError`.
        """
        from casemate_models.tensors import write_tensors

        target = Path(folder)
        contents = {
            "weights.safetensors": write_tensors(self.arrays),
            "provenance.json": json.dumps(self.provenance(), indent=2).encode(),
            "consortium": encode(self.bundle.chain),
            "release": encode(self.bundle.release),
            "result": self.bundle.envelope,
        }
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, data in contents.items():
                (target / name).write_bytes(data)
        except OSError as error:
            raise SetupError(f"cannot write to {target}: {error.strerror}") from error

    def privacy_events(self) -> RecordedEvents:
        """What each stated epsilon follows from, to be recomputed by anyone: ``casemate epsilon --events FILE``."""
        from casemate_privacy.recorded import events_of_result

        return events_of_result(self.job_id, self.terms.plan, self.privacy)

    def obligations(self) -> list[dict[str, Any]]:
        """What each owner's licence obliges the holder of this result to, as its key broker stated it in the Grant."""
        headers = [signed.peek(Grant).header for signed in self.manifest.grants]
        return [item.model_dump(mode="json") for header in headers for item in header.obligations]

    def provenance(self) -> dict[str, Any]:
        """What ran on whose data, at which epsilon, as plain JSON values."""
        return {
            "simulation": self.simulation,
            "consortium": self.manifest.consortium.hex(),
            "job_id": self.job_id,
            "terms": self.manifest.terms.digest.hex(),
            "purpose": self.terms.plan.purpose,
            "datasets": [
                {"dataset": use.dataset, "envelope": use.envelope.hex(), "licence": use.licence.hex()}
                for use in self.terms.plan.datasets
            ],
            "obligations": self.obligations(),
            "privacy": self.privacy.model_dump(mode="json"),
            "metrics": None if self.metrics is None else self.metrics.summary(),
            "audit": None if self.audit is None else self.audit.model_dump(mode="json", exclude={"padding"}),
            "clipping": self.manifest.clipping,
            "software": self.manifest.software,
            "isolation": self.manifest.isolation,
            "finished": self.manifest.finished,
            "verified": [
                {"step": step.number, "name": step.name, "by": step.by, "finding": step.finding}
                for step in self.verification.steps
            ],
        }

    def __str__(self) -> str:
        owners = [
            f"  {owner.dataset}: ε {owner.epsilon:.4g} at δ {owner.delta:g} (q {owner.sample_rate.fraction})"
            for owner in self.privacy.owners
        ]
        together = self.privacy.person_epsilon
        bound = "no bound known" if together is None else f"ε {together:.4g} at δ {self.privacy.person_delta:g}"
        person = f"  a person with a {self.privacy.unit} in each of them: {bound}"
        head = f"result of job {self.job_id}: {len(self.arrays)} tensors, all {len(self.verification.steps)} steps verified"
        software = ", ".join(f"{printable(k)} {printable(v)}" for k, v in sorted(self.manifest.software.items()))
        phases = ", then ".join(f"σ {item.noise_multiplier:.4g} for {item.steps} steps" for item in self.privacy.noise)
        noise = f"  {self.privacy.mechanism} noise, {phases}{_clipping(self.manifest.clipping)}"
        found = [] if self.metrics is None else [f"  {name} {value}" for name, value in self.metrics.summary().items()]
        lines = [head, *owners, person, noise, *found, f"  {software}; {printable(self.manifest.isolation)}"]
        if self.audit is not None:
            lines.insert(1, f"  {audited(self.audit)}")
        return "\n".join([*lines, f"  {SIMULATED}"] if self.simulation else lines)


def audited(report: AuditReport) -> str:
    """An audit in one line."""
    verdict = "REFUTES the guarantee" if report.refutes else "does not refute the guarantee"
    return (
        f"audit with {report.canaries} canaries: ε is at least {report.epsilon_lower:.4g} "
        f"({report.confidence:.2%} confidence; any mechanism: {report.one_run_epsilon:.4g}) at δ {report.delta:g}; "
        f"guaranteed: {report.epsilon:.4g}. This {verdict}"
    )


def open_result(bundle: Bundle, identity: Identity, expected: Expected) -> Result:
    """Verify, then read the weights within bounds. Raises :class:`~casemate_schemas.errors.ReleaseError`."""
    verified = verify_result(bundle, identity, expected)
    return Result(verified.verification, verified.manifest, verified.terms.terms, _arrays(verified), bundle)


def load(folder: str | os.PathLike[str], identity: Any, *, submitter: str | None = None) -> Result:
    """A result saved by :meth:`Result.save`, verified again from its bundle, offline.

    Args:
        identity: a recipient's key file or keys; their delegation names the consortium that is trusted.
        submitter: ``person@member`` whose terms it must answer; the identity's own if not given.

    Raises :class:`~casemate_schemas.errors.ReleaseError` that names the step.
    """
    me, source = Identity.of(identity), Path(folder)
    chain = decode(ManifestChain, read_file(source / "consortium", MAX_CHAIN_BYTES), max_bytes=MAX_CHAIN_BYTES)
    release = decode(Signed, read_file(source / "release", _MAX_RELEASE_BYTES), max_bytes=_MAX_RELEASE_BYTES)
    bundle = Bundle(chain, release, read_file(source / "result", MAX_RESULT_BYTES))
    return open_result(bundle, me, Expected(me.delegation.consortium, job_id_of(release), None, submitter))


def job_id_of(release: Signed) -> str:
    """The job that a release says it is of; not verified."""
    return release.peek(Release).job_id


def _clipping(strategies: Mapping[str, str]) -> str:
    """``, clipped by ghost (12), per_sample (4)``: strategies and how many parameters each served."""
    counts = sorted(Counter(strategies.values()).items())
    return f", clipped by {', '.join(f'{printable(name)} ({count})' for name, count in counts)}" if counts else ""


def _arrays(verified: VerifiedResult) -> dict[str, Array]:
    from casemate_models.tensors import read_tensors

    data = bytes(verified.weights)
    if verified.manifest.audit is not None:
        return {}
    return read_tensors(data, max_bytes=len(data), max_tensors=2 * MAX_NODES)
