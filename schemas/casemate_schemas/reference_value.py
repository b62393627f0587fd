"""What a program measures to, from which inputs and source, and which member says so: a reference value (RFC 9334, 4.2)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .attestation_policy import Measurement, Word
from .codec import UnixMs, WireModel
from .consortium import ConsortiumManifest, Member
from .errors import SignatureError
from .signatures import Signed

MAX_COMMAND_LINE: Final = 4096

Vmm = Literal["qemu", "ec2", "gce"]
Revision = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
"""A git commit's full hash."""
Sha384 = Annotated[bytes, Field(min_length=48, max_length=48)]


class MeasuredInput(WireModel):
    """One input by its digest: a file of the image, or a package of the simulated one."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    sha384: Sha384


class Launch(WireModel):
    """How the image is started, as far as that is measured."""

    vcpus: Annotated[int, Field(ge=1, le=4096)]
    vcpu_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,32}$")]
    guest_features: Word
    """SEV_FEATURES of the guest's save area."""
    vmm: Vmm
    command_line: Annotated[str, StringConstraints(max_length=MAX_COMMAND_LINE)] | None
    """The kernel's, byte for byte; None where the kernel is not measured."""


class ReferenceValue(WireModel):
    """A measurement and all that it was computed from, so that anyone can compute it again. Signed by a member.

    A manifest's policy lists measurements; this says what one of them is.
    """

    KIND: ClassVar[str] = "reference-value"

    version: Literal[1] = 1
    kind: Literal["sev-snp", "simulated"]
    measurement: Measurement
    inputs: Annotated[tuple[MeasuredInput, ...], Field(min_length=1, max_length=64)]
    launch: Launch | None
    revision: Revision | None
    created: UnixMs

    @model_validator(mode="after")
    def _says_what_its_kind_needs(self) -> Self:
        names = [item.name for item in self.inputs]
        if len(set(names)) != len(names):
            raise ValueError("each input may be listed once")
        if (self.launch is None) != (self.kind == "simulated"):
            raise ValueError("exactly a simulated image has no launch parameters")
        if self.kind == "sev-snp" and self.revision is None:
            raise ValueError("a real image is tied to the source's revision")
        return self


def verify_reference_value(signed: Signed, manifest: ConsortiumManifest) -> tuple[ReferenceValue, Member]:
    """The reference value and the member of ``manifest`` who signed it. Whether it is listed is another question.

    Raises :class:`SignatureError` if no member signed it, or if it is of another kind than the consortium: simulated for a
    real one, or the other way round; :class:`MalformedError` if it is none.
    """
    for member in manifest.members:
        if member.signing_key == signed.signer:
            value = signed.verify(ReferenceValue, member.signing_key)
            if (value.kind == "simulated") != manifest.simulation:
                raise SignatureError(f"expected a reference value of the manifest's kind, got a {value.kind} one")
            return value, member
    raise SignatureError("no member of the consortium signed this reference value")
