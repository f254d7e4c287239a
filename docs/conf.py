"""Sphinx configuration; build with `make doc`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "sb3_mbpo"
author = "sb3_mbpo contributors"
copyright = "2026, sb3_mbpo contributors"
release = (Path(__file__).parent.parent / "sb3_mbpo" / "version.txt").read_text(encoding="utf-8").strip()
version = release

# No intersphinx: with warnings as errors, a build without a network would fail.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "notebook_parser"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Types only for documented parameters: SAC's long list is documented once, in Stable-Baselines3.
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = f"sb3_mbpo {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
# Sphinx opens it from where it runs, not from here.
html_search_scorer = str(Path(__file__).parent / "search_scorer.js")
# Copy commands, not prompts.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
