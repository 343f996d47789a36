"""Who runs a meta-step: reference, functional and torch; the compiled ones join them here."""
