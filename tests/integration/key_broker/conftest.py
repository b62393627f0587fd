from support.nats import nats_stack

__all__ = ["nats_stack"]
