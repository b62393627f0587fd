from support.nats import nats_stack
from support.north import north

__all__ = ["nats_stack", "north"]
