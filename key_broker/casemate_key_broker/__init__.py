"""The key broker: a member's own program that holds its keys, judges what others ask, and keeps the privacy ledger."""
