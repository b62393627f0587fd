"""SEV-SNP attestation: report format, certificate chains, verification, appraisal, guests.

``report`` asks what the bytes are, ``verify`` whether they are genuine, ``appraise`` whether they meet policy.
"""
