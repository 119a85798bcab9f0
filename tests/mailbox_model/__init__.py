"""The mailbox's protocols (mailbox/LAYOUT.md) as explicit-state models: every interleaving, with a kill at every step."""
