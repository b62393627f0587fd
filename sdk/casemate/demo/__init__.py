"""The demonstration: three hospitals and one scientist, real patient records, SIMULATED attestation."""
