"""The gateway: HTTP on one side, NATS on the other, ciphertext and states in between. It keeps nothing and opens nothing.

:mod:`.settings` what an operator chooses, :mod:`.app` the program, :mod:`.authentication` who asks (RFC 9421),
:mod:`.bodies` what they send, :mod:`.problems` how refusals look (RFC 9457), :mod:`.records` who a job concerns,
:mod:`.transitions` and :mod:`.admission` how a job moves on, :mod:`.housekeeping` what is removed and when,
:mod:`.routes` one module for each kind of thing, :mod:`.gateway` what they share.
"""
