"""How far a dynamics can be trusted: measured while an agent learns, or of a saved agent as a report."""
