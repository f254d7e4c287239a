"""``sb3_mbpo compare``: train several algorithms and seeds, and report a table, figures and a page."""
