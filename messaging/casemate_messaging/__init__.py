"""What gateway, workers and key brokers do alike on NATS: carry ciphertext and signed messages, and open none.

:mod:`.server` an embedded nats-server, :mod:`.accounts` who may do what there, :mod:`.connection` connecting and errors,
:mod:`.setup` streams as they must be, :mod:`.blobs` ciphertext by digest, :mod:`.heads` heads of envelopes, :mod:`.jobs`
job records, :mod:`.queue` the work queue, :mod:`.events` events, :mod:`.publishing` writing to streams, :mod:`.nonces`
replay protection, :mod:`.rpc` request and reply, :mod:`.files` files whole and durable, :mod:`.tasks` background tasks
and their end.
"""
