"""A whole consortium on one machine: real programs, real NATS, real protocol, and a SIMULATED chip."""
