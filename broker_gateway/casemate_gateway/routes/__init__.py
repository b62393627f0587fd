"""One module for each kind of thing. A handler reads top to bottom: who asks, what they send, whether they may, the answer."""
