"""``casemate doctor``: what a new operator gets wrong, found before it hurts, with the setting or command that mends it."""
