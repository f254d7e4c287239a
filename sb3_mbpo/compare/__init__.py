"""``sb3_mbpo compare``: several algorithms and seeds, a table, figures and a page."""
